"""From encoded documents, in corpus order, to blocks of sequences.

A `Stream` takes the units of the corpus and closes sequences. How documents are placed is up to its
two kinds, `best_fit.BestFit` and `in_order.InOrder`. Both depend on the corpus order alone: not on
batches, processes or interruptions. Each block says where a run that continues begins to read.

The last sequences of a store are closed because the corpus ends (flushed). A larger
`data.max_samples` makes them again, and no other: their blocks' markers hold `end`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megadistill.data.encode import Unit
from megadistill.models.packed_sequences import Sequence


@dataclass(frozen=True)
class Cursor:
    """Where a run that continues begins to read the corpus.

    In document number `document`, in its piece `piece`, at token `token` of that piece. Of the
    sequences that are closed from there on, the first `sequences` lie in blocks already.
    """

    document: int = 0
    piece: int = 0
    token: int = 0
    sequences: int = 0


@dataclass(frozen=True)
class Block:
    """`cursor` is where the next block begins. `statistics` count what ends in this block."""

    number: int
    sequences: list[Sequence]
    statistics: dict[str, int]
    cursor: Cursor
    documents_read: int
    end: dict[str, Any] | None = None  # how the corpus ended, of blocks that its end has closed

    @property
    def extra(self) -> dict[str, Any]:
        """Returns the members of the block's marker for a run that continues."""
        cursor = {name: n for name, n in asdict(self.cursor).items() if n or name != "sequences"}
        end = {} if self.end is None else {"end": self.end}
        return {"cursor": cursor, "documents_read": self.documents_read} | end


@dataclass
class _Closed:
    """A sequence that is in no block yet."""

    sequence: Sequence
    statistics: Counter[str]
    cursor: Cursor
    documents_read: int
    flushed: bool


class Stream(ABC):
    """Takes encoded units (`add`), gives the blocks that are full (`full`), and the last (`last`).

    Begins with block `number`, at `cursor`. `begin`: ids that a document's continuation begins
    with, where it is cut.
    """

    def __init__(
        self, *, seq_len: int, block_size: int, begin: list[int], number: int, cursor: Cursor
    ) -> None:
        self.seq_len, self.block_size = seq_len, block_size
        # A sequence must have room for more than its begin.
        self._begin = np.array(begin if seq_len > len(begin) else [], np.uint32)
        self._number = number
        self._offset = cursor.token  # tokens of the first unit that lie in blocks already
        self._sequences = cursor.sequences
        self._closed: deque[_Closed] = deque()
        # Whether a token of the current document is placed, and whether it is known to be cut.
        self._begun, self._cut = cursor.piece > 0 or cursor.token > 0, False
        self._statistics: Counter[str] = Counter()  # of what is in no sequence yet
        self.documents_read = cursor.document

    def add(
        self, units: list[Unit], ids: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None
    ) -> None:
        """The next units of the corpus, as Encoder.encode gives them."""
        begin = 0
        for unit, length in zip(units, lengths.tolist(), strict=True):
            part = slice(begin + self._offset, begin + length)
            self.documents_read = unit.document + 1
            if unit.problem is not None and not self._begun:
                self._statistics["skipped_documents"] += 1
                continue
            self._place(unit, ids[part], None if mask is None else mask[part], self._offset)
            begin, self._offset = begin + length, 0

    def full(self) -> Iterator[Block]:
        """The blocks that are full and not the last: one more sequence is there."""
        while len(self._closed) > self.block_size:
            yield self._block(self.block_size, end=None)

    def last(self, *, exhausted: bool) -> Iterator[Block]:
        """The blocks that are left when the corpus has ended; none where no sequence is left.

        `exhausted`: whether the corpus ended by itself, and not by `data.max_samples`.
        """
        dropped = self._flush()
        if not self._closed:
            return
        # What comes behind the last sequence and has no token.
        for name in ("empty_documents", "skipped_documents"):
            if self._statistics[name]:
                self._closed[-1].statistics[name] += self._statistics[name]
        end = {
            "documents_read": self.documents_read,
            "exhausted": exhausted,
            "sequences": self._number * self.block_size + len(self._closed),
            **dropped,
        }
        while self._closed:
            count = min(self.block_size, len(self._closed))
            final = count == len(self._closed)
            flushed = any(self._closed[i].flushed for i in range(count))
            yield self._block(count, end=end if final or flushed else None)

    @property
    @abstractmethod
    def held(self) -> int:
        """Tokens that are in no sequence yet, and will be in none if the corpus ends here."""

    @abstractmethod
    def _place(self, unit: Unit, ids: np.ndarray, mask: np.ndarray | None, offset: int) -> None:
        """Places a unit's tokens, which begin at its token `offset`; closes sequences."""

    @abstractmethod
    def _flush(self) -> dict[str, int]:
        """Closes what is open at the corpus' end; returns what is dropped of it."""

    def _end_document(self, unit: Unit) -> None:
        """Counts a unit that is placed whole, and with its last unit the document."""
        self._statistics["characters"] += unit.characters
        if unit.last:
            self._statistics["documents"] += self._begun
            self._statistics["empty_documents"] += not self._begun
            self._statistics["cut_documents"] += self._cut
            self._begun = self._cut = False

    def _close(
        self, sequence: Sequence, statistics: Counter[str], cursor: Cursor, *, flushed: bool
    ) -> None:
        """A sequence is closed: the next one of a block, unless a block has it already."""
        if self._sequences:
            self._sequences -= 1
            return
        closed = _Closed(sequence, statistics, cursor, self.documents_read, flushed)
        self._closed.append(closed)

    def _block(self, count: int, *, end: dict[str, Any] | None) -> Block:
        """The next `count` sequences as a block."""
        taken = [self._closed.popleft() for _ in range(count)]
        counted = {name: 0 for name in ("documents", "empty_documents", "characters")}
        counted |= {name: 0 for name in ("cut_documents", "cut_tokens")}
        for closed in taken:
            for name, value in closed.statistics.items():
                counted[name] = counted.get(name, 0) + value
        sequences = [closed.sequence for closed in taken]
        masks = [s.loss_mask for s in sequences if s.loss_mask is not None]
        if masks:
            counted["learned_tokens"] = int(np.sum(masks))
        if sequences[0].padding is not None:
            counted["padding_tokens"] = sum(s.padding or 0 for s in sequences)
        last = taken[-1]
        block = Block(self._number, sequences, counted, last.cursor, last.documents_read, end)
        self._number += 1
        return block


def after(unit: Unit, token: int, length: int) -> Cursor:
    """The place behind token `token` of a unit of `length` tokens."""
    if token < length:
        return Cursor(unit.document, unit.piece, token)
    return Cursor(unit.document + 1) if unit.last else Cursor(unit.document, unit.piece + 1)
