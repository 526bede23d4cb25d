"""In-order packing: the corpus is cut at every T-th token.

    documents  d0 d0 d0 d0 d0 | d1 d1 d1 | d2 d2 d2 d2 d2 d2 | ...      every document ends with eos
    sequences  [d0 d0 d0 d0] [d0 d1 d1 d1] [d2 d2 d2 d2] [d2 d2 ...

Nothing is padded. The price is a document cut at nearly every sequence's end, and the tokens behind
the last whole sequence, which are dropped. Under `data.pack: isolate` a document that is cut
continues as a segment of its own, with `begin` in front. Memory: one block.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from megadistill.data.encode import Unit
from megadistill.data.packing.stream import Stream, after
from megadistill.models.packed_sequences import Sequence


class InOrder(Stream):
    """`isolate` False (`data.pack: concat`): a sequence is one segment, whatever it holds."""

    def __init__(self, *, isolate: bool, **shape: Any) -> None:
        super().__init__(**shape)
        self._isolate = isolate
        self._open()

    @property
    def held(self) -> int:
        return self._own_tokens

    def _open(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._starts: list[int] = []
        self._filled = self._own_tokens = self._documents = 0

    def _place(self, unit: Unit, ids: np.ndarray, mask: np.ndarray | None, offset: int) -> None:
        at = 0
        while True:
            if at < len(ids):
                at += self._fill(ids[at:], None if mask is None else mask[at:])
            if at == len(ids):
                self._end_document(unit)
            if self._filled == self.seq_len:
                self._close_open(after(unit, offset + at, offset + len(ids)))
            if at == len(ids):
                return

    def _fill(self, ids: np.ndarray, mask: np.ndarray | None) -> int:
        """Puts the document's next tokens into the open sequence; returns how many."""
        begins = not self._begun
        if not begins and not self._filled:
            self._cut = True
            if len(self._begin) and self._isolate:
                self._put(self._begin, None if mask is None else np.zeros(len(self._begin)))
                self._starts = [0]
        if not self._filled or (begins and self._isolate):
            self._starts.append(self._filled)
        count = min(self.seq_len - self._filled, len(ids))
        self._documents += begins or not self._own_tokens
        self._put(ids[:count], None if mask is None else mask[:count])
        self._own_tokens += count
        self._statistics["cut_tokens"] += count * self._cut
        self._begun = True
        return count

    def _put(self, ids: np.ndarray, mask: np.ndarray | None) -> None:
        self._tokens.append(ids)
        if mask is not None:
            self._masks.append(mask)
        self._filled += len(ids)

    def _close_open(self, cursor: Any) -> None:
        sequence = Sequence(
            np.concatenate(self._tokens).astype(np.uint32, copy=False),
            np.array(self._starts, np.uint32),
            np.concatenate(self._masks).astype(np.uint8, copy=False) if self._masks else None,
        )
        self._close(sequence, self._statistics, cursor, flushed=False)
        self._statistics = Counter()
        self._open()

    def _flush(self) -> dict[str, int]:
        return {"dropped_documents": self._documents, "dropped_tokens": self._own_tokens}
