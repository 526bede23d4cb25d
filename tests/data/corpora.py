"""Generated corpora for the tests of packing: documents of tokens, and how they are handed over."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadistill.data.encode import Unit
from megadistill.data.packing.best_fit import BestFit
from megadistill.data.packing.in_order import InOrder
from megadistill.data.packing.stream import Block, Cursor, Stream
from tests.data.packing import slow_packing

EOS, BOS = 1, 2


@dataclass(frozen=True)
class Corpus:
    """Documents of distinct token ids, some empty, some longer than a sequence."""

    documents: list[list[int]]
    units: list[list[list[int]]]  # each document's, as it is tokenised piece by piece
    masks: list[list[int]] | None
    seq_len: int
    block_size: int
    window: int
    bos: bool

    @property
    def begin(self) -> list[int]:
        return [BOS] if self.bos else []

    def upto(self, count: int) -> list[list[int]]:
        return self.documents[:count]


def corpus(seed: int) -> Corpus:
    rng = np.random.default_rng(seed)
    seq_len = int(rng.choice([1, 2, 3, 5, 8, 16, 33, 64]))
    bos, masked = bool(rng.integers(2)), bool(rng.integers(2))
    # Short documents, long ones, both, or all of one length.
    scale = seq_len * float(rng.choice([0.1, 0.4, 1.0, 3.0]))
    lengths = np.rint(rng.exponential(scale, int(rng.integers(1, 60)))).astype(int)
    if rng.integers(5) == 0:
        lengths[:] = rng.integers(1, 2 * seq_len + 1)
    if lengths.max() == 0:
        lengths[0] = 1
    documents, units, at = [], [], 3
    for length in lengths.tolist():
        document = list(range(at, at + length))
        at += length
        if document:
            document = [BOS] * bos + document + [EOS]
        documents.append(document)
        # The last piece has the end token; one in between may have no token.
        cuts = rng.integers(1, len(document), int(rng.integers(3))) if len(document) > 1 else []
        edges = [0, *sorted(int(cut) for cut in cuts), len(document)]
        units.append([document[a:b] for a, b in itertools.pairwise(edges)])
    masks = [rng.integers(0, 2, len(d)).tolist() for d in documents] if masked else None
    return Corpus(
        documents,
        units,
        masks,
        seq_len=seq_len,
        block_size=int(rng.integers(1, 9)),
        window=int(rng.integers(1, 12)),
        bos=bos,
    )


def stream(c: Corpus, packing: str, *, number: int = 0, cursor: Cursor | None = None) -> Stream:
    shape: dict[str, Any] = {
        "seq_len": c.seq_len,
        "block_size": c.block_size,
        "begin": c.begin,
        "number": number,
        "cursor": cursor or Cursor(),
    }
    if packing == "best_fit":
        return BestFit(filler=EOS, window=c.window, **shape)
    return InOrder(isolate=packing != "concat", **shape)


def blocks(
    c: Corpus,
    packing: str,
    *,
    count: int | None = None,
    number: int = 0,
    cursor: Cursor | None = None,
    batch: int = 3,
) -> list[Block]:
    """The blocks of the first `count` documents from `cursor` on, handed over in batches."""
    cursor = cursor or Cursor()
    count = len(c.documents) if count is None else count
    packed = stream(c, packing, number=number, cursor=cursor)
    found: list[Block] = []
    units = [
        (Unit(d, p, p == 0, p == len(c.units[d]) - 1, "x" * len(ids)), d, p, ids)
        for d in range(cursor.document, count)
        for p, ids in enumerate(c.units[d])
        if d > cursor.document or p >= cursor.piece
    ]
    for at in range(0, len(units), batch):
        part = units[at : at + batch]
        ids = [np.array(ids, np.uint32) for _, _, _, ids in part]
        masks = [_mask(c, d, p) for _, d, p, _ in part]
        lengths = np.array([len(i) for i in ids], np.int64)
        mask = None if c.masks is None else np.concatenate(masks)
        packed.add([unit for unit, *_ in part], np.concatenate(ids), lengths, mask)
        found += packed.full()
    return found + list(packed.last(exhausted=count == len(c.documents)))


def slow(c: Corpus, packing: str, count: int | None = None) -> list[slow_packing.Row]:
    documents = c.upto(len(c.documents) if count is None else count)
    if packing == "best_fit":
        return slow_packing.best_fit(documents, seq_len=c.seq_len, bos=c.bos, window=c.window)
    return slow_packing.in_order(documents, seq_len=c.seq_len, bos=c.bos)[0]


def _mask(c: Corpus, document: int, piece: int) -> np.ndarray:
    assert c.masks is None or document < len(c.masks)
    before = sum(len(u) for u in c.units[document][:piece])
    values = [] if c.masks is None else c.masks[document]
    return np.array(values[before : before + len(c.units[document][piece])], np.uint8)
