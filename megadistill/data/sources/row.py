"""Row of a corpus, and the count of rows that a resumed run passes over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Row(NamedTuple):
    """The values of the columns that were asked for, or the problem of a row that has none.

    place: where the row stands in its file: `line 3` counts from 1, `row 2` counts from 0.
    """

    place: str
    values: tuple[Any, ...] = ()
    problem: str | None = None


@dataclass
class Skip:
    """Rows that are still to be passed over. Readers lower it; it spans all files of a corpus."""

    left: int = 0

    def take(self, rows: int) -> int:
        """How many of the next `rows` rows are passed over."""
        passed = min(self.left, rows)
        self.left -= passed
        return passed
