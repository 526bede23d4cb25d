"""Encoded documents, in order, become blocks of sequences; each block says where the next begins.

The stream of tokens is cut at absolute positions (block b begins at token b * block_size * T), so a
block is a function of the corpus alone: not of batches, processes or interruptions. At most one
block and one sequence are held, plus what came with the last batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from megadistill.data.encode import Unit
from megadistill.data.packing import Sequence, pack


@dataclass(frozen=True)
class Cursor:
    """Where in the corpus a block begins.

    In document number `document`, in its piece `piece`, at token `token` of that piece.
    """

    document: int = 0
    piece: int = 0
    token: int = 0


@dataclass(frozen=True)
class Block:
    """`cursor` is where the next block begins. `statistics` count what ends in this block."""

    number: int
    sequences: list[Sequence]
    statistics: dict[str, int]
    cursor: Cursor
    end: dict[str, Any] | None = None  # of the last block: how the corpus ended

    @property
    def extra(self) -> dict[str, Any]:
        """What the block's marker holds for a run that continues."""
        end = {} if self.end is None else {"end": self.end}
        return {"cursor": asdict(self.cursor)} | end


class _Piece(NamedTuple):
    """A unit's place in the stream, in tokens from the corpus' first."""

    unit: Unit
    begin: int
    end: int


class Stream:
    """Takes encoded units (`add`), gives the blocks that are full (`full`), and the last (`last`).

    Begins with block `number`, at `cursor`.
    """

    def __init__(
        self, *, seq_len: int, block_size: int, isolate: bool, number: int, cursor: Cursor
    ) -> None:
        self.seq_len, self.block_size, self.isolate = seq_len, block_size, isolate
        self._number = number
        self._start = number * block_size * seq_len  # of what is held
        self._end = self._start - cursor.token  # where the next unit goes
        self._skip = cursor.token  # tokens of the first unit that the block before has
        self._next_document = cursor.document
        self._pieces: deque[_Piece] = deque()
        self._tokens: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []

    def add(
        self, units: list[Unit], ids: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None
    ) -> None:
        """The next units of the corpus, as Encoder.encode gives them."""
        for unit, length in zip(units, lengths.tolist(), strict=True):
            self._pieces.append(_Piece(unit, self._end, self._end + length))
            self._end += length
        self._next_document = units[-1].document + units[-1].last
        skip, self._skip = min(self._skip, len(ids)), max(0, self._skip - len(ids))
        self._tokens.append(ids[skip:])
        if mask is not None:
            self._masks.append(mask[skip:])

    def full(self) -> Iterator[Block]:
        """The blocks that are full and not the last: one more sequence is there."""
        while self._end - self._start >= (self.block_size + 1) * self.seq_len:
            yield self._cut(self.block_size, end=None)

    def last(self, *, exhausted: bool) -> Block | None:
        """The last block; None where not one sequence is left. What remains is dropped, and said.

        `exhausted`: whether the corpus ended by itself, and not by `data.max_samples`.
        """
        held = self._end - self._start
        if held < self.seq_len:
            return None
        end = {
            "documents_read": self._next_document,
            "exhausted": exhausted,
            "dropped_tokens": held % self.seq_len,
        }
        return self._cut(held // self.seq_len, end=end)

    @property
    def held(self) -> int:
        """Tokens that are in no block yet."""
        return self._end - self._start

    def _cut(self, count: int, *, end: dict[str, Any] | None) -> Block:
        """The next `count` sequences as a block."""
        stop = self._start + count * self.seq_len
        starts, statistics = self._pass_over(stop)
        sequences = pack(
            _take(self._tokens, count * self.seq_len),
            starts,
            seq_len=self.seq_len,
            loss_mask=_take(self._masks, count * self.seq_len) if self._masks else None,
            isolate=self.isolate,
        )
        uncut = int(np.isin(np.arange(1, count) * self.seq_len, starts).sum())
        ahead = self._pieces[0] if self._pieces else None
        uncut += ahead is None or (ahead.begin == stop and ahead.unit.first)
        statistics["cut_documents"] = count - uncut
        masks = [s.loss_mask for s in sequences if s.loss_mask is not None]
        if masks:
            statistics["learned_tokens"] = int(np.sum(masks))
        cursor = Cursor(self._next_document)
        if ahead is not None:
            cursor = Cursor(ahead.unit.document, ahead.unit.piece, stop - ahead.begin)
        block = Block(self._number, sequences, statistics, cursor, end)
        self._number, self._start = self._number + 1, stop
        return block

    def _pass_over(self, stop: int) -> tuple[np.ndarray, dict[str, int]]:
        """Document starts from here to `stop` (int64, from here), and counts of what ends there.

        Documents without a token at `stop` belong here: one sequence more is held, or the corpus
        has ended, so all of them are known.
        """
        starts = []
        statistics = {"documents": 0, "empty_documents": 0, "characters": 0}
        while self._pieces:
            unit, begin, end = self._pieces[0]
            if unit.first and begin < end and self._start <= begin < stop:
                starts.append(begin - self._start)
            if end > stop:
                break
            if unit.problem is not None:
                # Counted where there are any: stores of good corpora have no such count.
                statistics["skipped_documents"] = statistics.get("skipped_documents", 0) + 1
                self._pieces.popleft()
                continue
            empty = begin == end and unit.first and unit.last
            statistics["empty_documents"] += empty
            statistics["documents"] += unit.last and not empty
            statistics["characters"] += unit.characters
            self._pieces.popleft()
        return np.array(starts, dtype=np.int64), statistics


def _take(arrays: list[np.ndarray], count: int) -> np.ndarray:
    """The first `count` elements; `arrays` keeps the others.

    Those are copied, so that a small rest does not keep a large array alive.
    """
    whole = np.concatenate(arrays)
    arrays[:] = [whole[count:].copy()]
    return whole[:count]
