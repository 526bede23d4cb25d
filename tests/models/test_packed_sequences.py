import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megadistill.data.encode import Unit
from megadistill.data.packing.in_order import InOrder
from megadistill.data.packing.stream import Cursor
from megadistill.models.packed_sequences import labels, position_ids, sample_labels


def test_positions_start_again_at_every_document():
    documents = np.array([0, 3, 4], dtype=np.uint32)
    assert position_ids(documents, 8).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


def test_a_label_is_the_next_token_of_the_same_document():
    tokens = np.array([10, 11, 12, 20, 30, 31, 32, 33], dtype=np.uint32)
    documents = np.array([0, 3, 4], dtype=np.uint32)
    expected = [11, 12, -100, -100, 31, 32, 33, -100]
    assert labels(tokens, documents).tolist() == expected
    assert labels(tokens, documents).dtype == np.int64


def test_a_masked_token_is_nobodys_label():
    tokens = np.array([10, 11, 12, 13, 20, 21], dtype=np.uint32)
    documents = np.array([0, 4], dtype=np.uint32)
    mask = np.array([0, 0, 1, 1, 1, 0], dtype=np.uint8)
    # Token 20 is learned by mask, but the position before it lies in another document.
    assert labels(tokens, documents, mask).tolist() == [-100, 12, 13, -100, -100, -100]


def test_the_largest_token_id_keeps_its_value_as_a_label():
    tokens = np.array([0, 2**32 - 1], dtype=np.uint32)
    assert labels(tokens, np.array([0], dtype=np.uint32)).tolist() == [2**32 - 1, -100]


def test_padding_has_no_label_and_is_no_label():
    tokens = np.array([10, 11, 12, 20, 21, 1, 1, 1], dtype=np.uint32)
    documents = np.array([0, 3, 5], dtype=np.uint32)
    expected = [11, 12, -100, 21, -100, -100, -100, -100]
    assert labels(tokens, documents, padding=3).tolist() == expected
    sample = {"tokens": tokens, "documents": documents, "padding": 3}
    assert sample_labels(sample).tolist() == expected
    mask = np.array([1, 0, 1, 1, 1, 0, 0, 0], dtype=np.uint8)
    learned = sample_labels({**sample, "loss_mask": mask})
    assert learned.tolist() == [-100, 12, -100, 21, -100, -100, -100, -100]
    assert sample_labels({**sample, "loss_mask": mask}, masked=False).tolist() == expected


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    seq_len=st.integers(1, 9),
    masked=st.booleans(),
    isolate=st.booleans(),
)
def test_packing_in_order_says_the_same_as_going_token_by_token(lengths, seq_len, masked, isolate):
    tokens = np.arange(sum(lengths), dtype=np.uint32)
    mask = (tokens % 3 == 0).astype(np.uint8) if masked else None
    stream = InOrder(
        isolate=isolate, seq_len=seq_len, block_size=1000, begin=[], number=0, cursor=Cursor()
    )
    units = [Unit(number, text="x") for number in range(len(lengths))]
    stream.add(units, tokens, np.array(lengths), mask)
    sequences = [s for block in stream.last(exhausted=True) for s in block.sequences]
    assert len(sequences) == len(tokens) // seq_len
    owner = np.repeat(np.arange(len(lengths)) if isolate else np.zeros(len(lengths)), lengths)
    for s, sequence in enumerate(sequences):
        at = range(s * seq_len, (s + 1) * seq_len)
        assert sequence.tokens.tolist() == list(at)
        assert sequence.tokens.dtype == sequence.documents.dtype == np.uint32
        begins = [i for i, t in enumerate(at) if i == 0 or owner[t] != owner[t - 1]]
        assert sequence.documents.tolist() == begins
        positions = position_ids(sequence.documents, seq_len)
        assert positions.tolist() == [i - max(b for b in begins if b <= i) for i in range(seq_len)]
        for i, label in enumerate(labels(sequence.tokens, sequence.documents, sequence.loss_mask)):
            t = at[i]
            there = i + 1 < seq_len and owner[t] == owner[t + 1]
            learned = there and (mask is None or mask[t + 1])
            assert label == (t + 1 if learned else -100)
