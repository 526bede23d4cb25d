"""Best-fit packing: only documents that are longer than a sequence are cut.

"Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), over a window of the corpus:

1. A document longer than a sequence gives whole sequences, which are closed at once. Its rest is a
   piece, as a shorter document is. What continues a document begins with `begin` (its tokenizer's
   BOS), because models are trained to see one at position 0.
2. Pieces are collected until WINDOW sequences' worth of tokens are read. Then each piece, the
   longest first, goes into the fullest sequence that has room for it, or opens a new one. All are
   closed, and the next window begins.
3. What stays open in a sequence is padding: a last segment of `filler` ids, which is a document of
   its own, so no other position sees it.

A sequence holds its pieces in corpus order, and a window's sequences are closed in the order of
their first pieces. A window depends on the documents in it alone, so a run continues where the
window begins and passes over the sequences that lie in blocks already.

Memory: one block, one batch, and twice the window: WINDOW * T tokens (4 MiB at T = 2,048, 256 MiB
at 131,072) with 52 bytes a piece, and the sequences that they become. At most 2 * WINDOW + 1
sequences are open when the corpus ends, since any two of them hold more than T tokens together.
Those are made again when the corpus grows.

Padding, measured: 0.2 % of documents of 1,000 tokens on average (lognormal, sigma 1) at T = 2,048;
0.6 % with a window of 128, 0.1 % with one of 1,024.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from megadistill.data.encode import Unit
from megadistill.data.packing.stream import Cursor, Stream, after
from megadistill.models.packed_sequences import Sequence

WINDOW = 512  # sequences


_COUNTED = (
    "documents",
    "empty_documents",
    "skipped_documents",
    "characters",
    "cut_documents",
    "cut_tokens",
)


class _Pieces:
    """Documents, and last parts of documents, that are shorter than a sequence.

    In flat arrays: a short document would take ten times as much as an object of its own.
    """

    def __init__(self) -> None:
        self._tokens, self._mask, self._lengths = array("I"), array("B"), array("I")
        self._counts = {name: array("q") for name in _COUNTED}

    def append(self, tokens: np.ndarray, mask: np.ndarray | None, statistics: Counter[str]) -> None:
        self._tokens.frombytes(tokens.astype(np.uint32, copy=False).tobytes())
        if mask is not None:
            self._mask.frombytes(mask.astype(np.uint8, copy=False).tobytes())
        self._lengths.append(len(tokens))
        for name, counts in self._counts.items():
            counts.append(statistics[name])

    @property
    def lengths(self) -> np.ndarray:
        """int64 [pieces]."""
        return np.array(self._lengths, np.int64)

    def taken(
        self, numbers: list[int], starts: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None, Counter[str]]:
        """(tokens of each, masks of each, their counts together). starts: of each in the tokens."""
        spans = [slice(int(starts[n]), int(starts[n]) + self._lengths[n]) for n in numbers]
        tokens, mask = np.frombuffer(self._tokens, np.uint32), np.frombuffer(self._mask, np.uint8)
        counted = {name: sum(counts[n] for n in numbers) for name, counts in self._counts.items()}
        return (
            [tokens[span] for span in spans],
            [mask[span] for span in spans] if len(mask) else None,
            +Counter(counted),
        )


class BestFit(Stream):
    """`filler`: the id that padding consists of. `window`: in sequences; default: WINDOW."""

    def __init__(
        self, *, filler: int, window: int | None = None, cursor: Cursor, **shape: Any
    ) -> None:
        super().__init__(cursor=cursor, **shape)
        self._filler, self._window_tokens = filler, (window or WINDOW) * self.seq_len
        self._rest = np.zeros(0, np.uint32)  # of the current document
        self._rest_mask: np.ndarray | None = None
        self._cut = self._begun  # a window begins behind a cut, or with a document
        self._open_window(replace(cursor, sequences=0))

    @property
    def held(self) -> int:
        return 0

    def _open_window(self, start: Cursor) -> None:
        self._start, self._read, self._in_window = start, 0, 0
        self._pieces = _Pieces()

    def _place(self, unit: Unit, ids: np.ndarray, mask: np.ndarray | None, offset: int) -> None:
        before, length = len(self._rest), len(ids)
        ids = np.concatenate([self._rest, ids])
        if mask is not None and self._rest_mask is not None:
            mask = np.concatenate([self._rest_mask, mask])
        at = 0
        self._begun |= len(ids) > 0
        while len(ids) - at > (room := self._room()):
            # More of the document follows, so this is no last part.
            self._end_piece(ids[at : at + room], None if mask is None else mask[at : at + room])
            at, self._cut = at + room, True
            self._end_window(after(unit, offset + at - before, offset + length))
        self._rest, self._rest_mask = ids[at:], None if mask is None else mask[at:]
        if not unit.last:
            self._end_document(unit)
            return
        rest, rest_mask, is_cut = self._rest, self._rest_mask, self._cut
        self._rest, self._rest_mask = ids[:0], None
        self._end_document(unit)
        if len(rest):
            self._cut = is_cut
            self._end_piece(rest, rest_mask)
            self._cut = False
        self._end_window(after(unit, offset + length, offset + length))

    def _room(self) -> int:
        return self.seq_len - (len(self._begin) if self._cut else 0)

    def _end_piece(self, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        if self._cut:
            self._statistics["cut_tokens"] += len(tokens)
            tokens = np.concatenate([self._begin, tokens])
            if mask is not None:
                mask = np.concatenate([np.zeros(len(self._begin), np.uint8), mask])
        self._read += len(tokens)
        statistics, self._statistics = self._statistics, Counter()
        if len(tokens) < self.seq_len:
            self._pieces.append(tokens, mask, statistics)
        else:
            masks = None if mask is None else [mask]
            self._close_sequence([tokens], masks, statistics, flushed=False)

    def _end_window(self, following: Cursor) -> None:
        """Closes the window if it is full. `following`: where the next one begins."""
        if self._read < self._window_tokens:
            return
        self._close_window(flushed=False)
        # The last sequence's block need not read this window again.
        if self._closed:
            self._closed[-1].cursor = following
        self._open_window(following)

    def _close_window(self, *, flushed: bool) -> None:
        lengths = self._pieces.lengths
        starts = np.cumsum(lengths) - lengths
        for numbers in best_fit(lengths, self.seq_len):
            self._close_sequence(*self._pieces.taken(numbers, starts), flushed=flushed)

    def _close_sequence(
        self,
        pieces: list[np.ndarray],
        masks: list[np.ndarray] | None,
        statistics: Counter[str],
        *,
        flushed: bool,
    ) -> None:
        lengths = [len(piece) for piece in pieces]
        padding = self.seq_len - sum(lengths)
        starts = np.cumsum([0, *lengths])
        filler = np.full(padding, self._filler, np.uint32)
        if masks is not None:
            masks = [*masks, np.zeros(padding, np.uint8)]
        self._in_window += 1
        sequence = Sequence(
            np.concatenate([*pieces, filler]).astype(np.uint32, copy=False),
            (starts if padding else starts[:-1]).astype(np.uint32),
            None if masks is None else np.concatenate(masks).astype(np.uint8, copy=False),
            padding,
        )
        cursor = replace(self._start, sequences=self._in_window)
        self._close(sequence, statistics, cursor, flushed=flushed)

    def _flush(self) -> dict[str, int]:
        self._close_window(flushed=True)
        return {"dropped_documents": 0, "dropped_tokens": 0}


def best_fit(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the numbers of the pieces in each bin, rising, bins by their first.

    Every length is at most `capacity`. Among equal pieces the earlier one comes first, among
    equally full bins the older one. Costs n log n comparisons and, for n bins that stay open, moves
    of up to n list entries a piece.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free, bin) of the bins that are not full, rising
    lengths_P = np.fromiter(lengths, np.int64)
    order_P = np.argsort(-lengths_P, kind="stable")
    for number, length in zip(order_P.tolist(), lengths_P[order_P].tolist(), strict=True):
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            bins.append([])
            free, chosen = capacity, len(bins) - 1
        else:
            free, chosen = rooms.pop(place)
        bins[chosen].append(number)
        if free > length:
            insort(rooms, (free - length, chosen))
    return sorted(sorted(numbers) for numbers in bins)
