"""Packing, compared with a slow one that holds the whole corpus (slow_packing.py)."""

import numpy as np
import pytest

from megadistill.data.packing.best_fit import best_fit
from megadistill.models.packed_sequences import labels
from tests.data.corpora import BOS, EOS, blocks, corpus, slow
from tests.data.packing import slow_packing

SEEDS = [
    pytest.param(range(0, 30), id="0-29"),
    *(
        pytest.param(
            range(n, n + 20), id=f"{n}-{n + 19}", marks=[pytest.mark.long, pytest.mark.text]
        )
        for n in range(30, 230, 20)
    ),
]
PACKINGS = ("best_fit", "in_order")


def sequences(found):
    return [s for block in found for s in block.sequences]


def same(a, b):
    return (
        a.tokens.tolist() == b.tokens.tolist()
        and a.documents.tolist() == b.documents.tolist()
        and a.padding == b.padding
        and (a.loss_mask is None) == (b.loss_mask is None)
        and (a.loss_mask is None or a.loss_mask.tolist() == b.loss_mask.tolist())
    )


def same_block(a, b):
    names = ("number", "statistics", "cursor", "documents_read", "end")
    return all(getattr(a, name) == getattr(b, name) for name in names) and all(
        same(x, y) for x, y in zip(a.sequences, b.sequences, strict=True)
    )


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seeds", SEEDS)
def test_the_sequences_are_those_of_a_slow_packing(seeds, packing):
    for c in map(corpus, seeds):
        found, expected = sequences(blocks(c, packing)), slow(c, packing)
        assert len(found) == len(expected)
        for sequence, row in zip(found, expected, strict=True):
            assert sequence.tokens.tolist() == row.tokens(c.seq_len, BOS, EOS)
            assert sequence.documents.tolist() == row.documents(c.seq_len)
            assert (sequence.padding or 0) == c.seq_len - row.length()
            assert (sequence.padding is None) == (packing == "in_order")
            if c.masks is not None:
                mask = []
                for document, at, tokens, bos in row.segments:
                    mask += [0] * bos + c.masks[document][at : at + len(tokens)]
                assert sequence.loss_mask.tolist() == mask + [0] * (c.seq_len - row.length())


@pytest.mark.parametrize("seeds", SEEDS)
def test_every_token_of_every_document_appears_once_in_order_and_padding_comes_last(seeds):
    for c in map(corpus, seeds):
        pieces = []
        for sequence in sequences(blocks(c, "best_fit")):
            tokens, end = sequence.tokens.tolist(), c.seq_len - sequence.padding
            assert tokens[end:] == [EOS] * sequence.padding
            starts = [s for s in sequence.documents.tolist() if s < end]
            assert sequence.documents.tolist() == starts + [end] * (sequence.padding > 0)
            pieces += [tokens[a:b] for a, b in zip(starts, [*starts[1:], end], strict=True)]
            learned = labels(sequence.tokens, sequence.documents, padding=sequence.padding)
            assert (learned[end:] == -100).all()
            assert BOS not in learned.tolist()
        # Ids are distinct but for BOS and eos: where a piece belongs is seen from its own ids.
        owner = {t: n for n, d in enumerate(c.documents) for t in d if t > BOS}
        found: dict[int, list] = {}
        alone = []
        for piece in pieces:
            own = [t for t in piece if t > BOS]
            if not own:
                alone.append(piece)  # an eos, with or without a BOS, that was cut off
                continue
            (number,) = {owner[t] for t in own}
            found.setdefault(number, []).append((min(own), piece))
        for number, document in enumerate(c.documents):
            if not document:
                assert number not in found
                continue
            parts = [piece for _, piece in sorted(found.get(number, []))]
            cut = [p[1:] if c.bos and c.seq_len > 1 and i else p for i, p in enumerate(parts)]
            rebuilt = [t for part in cut for t in part]
            if rebuilt != document:  # its eos, or with sequences of one token its BOS, stands alone
                lost = [t for t in document if t <= BOS and document.count(t) > rebuilt.count(t)]
                assert [t for t in document if t > BOS] == [t for t in rebuilt if t > BOS]
                for token in lost:
                    piece = next(p for p in alone if p[-1] == token)
                    alone.remove(piece)
        assert alone == []


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seeds", SEEDS)
def test_any_batches_and_a_start_at_any_block_give_the_same_blocks(seeds, packing):
    for c in map(corpus, seeds):
        whole = blocks(c, packing)
        for batch in (1, 7, 10_000):
            again = blocks(c, packing, batch=batch)
            assert len(again) == len(whole)
            assert all(same_block(a, b) for a, b in zip(whole, again, strict=True))
        for at in range(1, len(whole)):
            rest = blocks(c, packing, number=at, cursor=whole[at - 1].cursor)
            assert len(rest) == len(whole) - at
            assert all(same_block(a, b) for a, b in zip(whole[at:], rest, strict=True))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seeds", SEEDS)
def test_more_documents_change_only_what_the_end_has_closed(seeds, packing):
    for c in map(corpus, seeds):
        whole = blocks(c, packing)
        expected = slow(c, packing)
        for count in range(len(c.documents)):
            fewer = blocks(c, packing, count=count)
            before = slow(c, packing, count)
            closed = sum(not row.flushed for row in before)
            assert before[:closed] == expected[:closed]
            flushed = len(before) - closed
            assert flushed <= 2 * c.window + 1
            done_again = [block for block in fewer if block.end is not None]
            assert len(done_again) <= -(-flushed // c.block_size) + 1
            kept = fewer[: len(fewer) - len(done_again)]
            assert all(same_block(a, b) for a, b in zip(kept, whole, strict=False))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seeds", SEEDS)
def test_documents_and_tokens_are_counted_once_cut_or_not(seeds, packing):
    for c in map(corpus, seeds):
        found = blocks(c, packing)
        total: dict[str, int] = {}
        for block in found:
            for name, value in block.statistics.items():
                total[name] = total.get(name, 0) + value
        rows = slow(c, packing)
        ends = {(d, at + len(tokens)) for row in rows for d, at, tokens, _ in row.segments}
        whole = {n for n, d in enumerate(c.documents) if d and (n, len(d)) in ends}
        behind = [(d, len(t)) for row in rows for d, at, t, _ in row.segments if at > 0]
        if not rows:
            assert found == []
            continue
        end = found[-1].end
        assert total["documents"] == len(whole)
        assert total["cut_documents"] == len({d for d, _ in behind} & whole)
        assert total["cut_tokens"] == sum(n for _, n in behind)
        assert total["empty_documents"] == sum(not d for d in c.documents)
        assert total["documents"] + total["empty_documents"] + end["dropped_documents"] == len(
            c.documents
        )
        stored = sum(len(t) for row in rows for _, _, t, _ in row.segments)
        assert stored + end["dropped_tokens"] == sum(len(d) for d in c.documents)
        padding = sum(c.seq_len - row.length() for row in rows)
        assert total.get("padding_tokens", 0) == padding
        assert end["sequences"] == len(rows)


def test_no_two_sequences_of_a_window_would_fit_into_one():
    rng = np.random.default_rng(0)
    for _ in range(50):
        capacity = int(rng.integers(2, 100))
        lengths = rng.integers(1, capacity, int(rng.integers(1, 200))).tolist()
        bins = best_fit(lengths, capacity)
        assert sorted(n for numbers in bins for n in numbers) == list(range(len(lengths)))
        sums = sorted(sum(lengths[n] for n in numbers) for numbers in bins)
        assert sums[-1] <= capacity
        assert len(sums) == 1 or sums[0] + sums[1] > capacity


def test_a_document_that_is_cut_continues_with_its_begin_token():
    # Sequences of 4: the long document's rest begins with a BOS, which nothing predicts.
    rows = slow_packing.best_fit([[2, 5, 6, 7, 8, 9, 1]], seq_len=4, bos=True, window=1)
    assert [row.tokens(4, BOS, EOS) for row in rows] == [[2, 5, 6, 7], [2, 8, 9, 1]]
