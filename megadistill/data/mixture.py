"""Which source each draw of a mixture comes from: shares kept to within one draw, at any length.

Draw p of the mixture is draw c of its source. Draws go round in a period of at most 65,536, in
which every source has exactly its share. Within it draw c of a source with share a may stand at
positions floor(c / a) to ceil((c + 1) / a) - 1, and each position takes the draw whose last chance
comes first. Earliest deadline first meets every deadline of one machine that can be met at all, and
the shares themselves, each position cut up among the sources, show that all can (Tijdeman, "The
chairman assignment problem", 1980). So after any number of draws no source is a whole draw ahead
of its share, or behind. Shares that have no period that short are rounded, by 1/65,536 of all
draws at most: no sequence is lost by that, its store is passed over a little sooner or later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

PERIOD = 1 << 16


class Mixture:
    """An endless interleaving of sources. amounts: what an epoch draws of each, above 0."""

    def __init__(self, amounts: Sequence[Fraction]) -> None:
        self.counts = np.array(_whole(amounts), np.int64)
        self.period = int(self.counts.sum())
        self._source, self._turn = _interleave(self.counts.tolist())

    def draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, how-manieth draw of that source) at each position, int64."""
        round_, at = np.divmod(positions, self.period)
        source = self._source[at]
        return source, round_ * self.counts[source] + self._turn[at]


def _whole(amounts: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the proportion of `amounts`, with a sum of at most PERIOD."""
    common = math.lcm(*(a.denominator for a in amounts))
    whole = [int(a * common) for a in amounts]
    whole = [w // math.gcd(*whole) for w in whole]
    total = sum(whole)
    if total <= PERIOD:
        return whole
    return [max(1, round(Fraction(w * (PERIOD - len(whole)), total))) for w in whole]


def _interleave(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(source, turn) of each draw of one period."""
    total, turns = sum(counts), [0] * len(counts)
    sources, drawn = np.empty(total, np.int64), np.empty(total, np.int64)
    deadlines = [-(-total // count) for count in counts]
    for position in range(total):
        best = -1
        for source, count in enumerate(counts):
            # Its turn may stand here: turns / share < position + 1.
            if turns[source] * total < (position + 1) * count and (
                best < 0 or deadlines[source] < deadlines[best]
            ):
                best = source
        sources[position], drawn[position] = best, turns[best]
        turns[best] += 1
        deadlines[best] = -(-(turns[best] + 1) * total // counts[best])
    return sources, drawn
