"""A packed sequence is its documents, each alone, and padding that nothing sees or learns."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megadistill.blocks import BlockWriter
from megadistill.models.attention import forward_inputs
from megadistill.models.packed_sequences import sample_labels
from megadistill.train.training_source import TrainingSource, micro_batch
from tests.data.packing import slow_packing
from tests.models.made import tiny_llama

SEQ_LEN, BOS, EOS, VOCAB = 24, 1, 0, 96


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(a store of documents packed by best fit, its rows as a slow packing says)."""
    rng = np.random.default_rng(3)
    documents = [
        [BOS, *rng.integers(2, VOCAB, n).tolist(), EOS] for n in rng.integers(1, 40, 30).tolist()
    ]
    rows = slow_packing.best_fit(documents, seq_len=SEQ_LEN, bos=True, window=8)
    assert any(row.length() < SEQ_LEN for row in rows)
    assert any(bos for row in rows for _, _, _, bos in row.segments)
    store = BlockWriter.create(
        tmp_path_factory.mktemp("packed") / "tokens",
        kind="tokens",
        header={"recipe": {"seq_len": SEQ_LEN, "tokenizer": {"vocab_size": VOCAB}}},
        columns={
            "tokens": f"ndarray:uint32:{SEQ_LEN}",
            "documents": "ndarray:uint32",
            "padding": "uint64",
        },
        block_size=len(rows),
    )
    samples = [
        {
            "tokens": np.array(row.tokens(SEQ_LEN, BOS, EOS), np.uint32),
            "documents": np.array(row.documents(SEQ_LEN), np.uint32),
            "padding": np.uint64(SEQ_LEN - row.length()),
        }
        for row in rows
    ]
    store.plan(len(rows))
    padding = sum(SEQ_LEN - row.length() for row in rows)
    store.commit(0, samples, statistics={"padding_tokens": padding})
    store.finish()
    return store, rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny_llama(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").double().eval()


@torch.no_grad()
def test_the_loss_of_packed_sequences_is_the_sum_over_documents_alone(packed, model):
    store, rows = packed
    alone, positions = 0.0, 0
    for row in rows:
        for _, _, tokens, bos in row.segments:
            ids = torch.tensor([[BOS] * bos + tokens])
            if ids.shape[1] > 1:
                logits = model(input_ids=ids).logits[0, :-1]
                alone += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
                positions += ids.shape[1] - 1
    batch = micro_batch(
        [TrainingSource(store, store, has_targets=False)],
        [(0, i) for i in range(len(rows))],
        with_targets=False,
    )
    logits = model(**forward_inputs(model, batch.tokens_BT, batch.documents)).logits.flatten(0, 1)
    labels = torch.as_tensor(batch.labels_N)
    assert batch.ce_count == positions
    assert batch.num_tokens == sum(row.length() for row in rows)
    assert float(cross_entropy(logits, labels, reduction="sum")) == pytest.approx(alone, rel=1e-9)


@torch.no_grad()
def test_other_ids_in_the_padding_change_no_other_position(packed, model):
    store, _ = packed
    sample = next(s for s in store if s["padding"] > 2)
    end = SEQ_LEN - int(sample["padding"])
    other = sample["tokens"].copy()
    other[end:] = 50
    found = [
        model(**forward_inputs(model, tokens[None], [sample["documents"]])).logits[0, :end]
        for tokens in (sample["tokens"], other)
    ]
    assert torch.equal(*found)
    assert (sample_labels(sample)[end - 1 :] == -100).all()
