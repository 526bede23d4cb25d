"""Streams of sampled targets: varopt and multinomial.

varopt. Weights are rounded to GRID-ths of the whole, at random and without bias (rounding.py),
which also drops what rounds to nothing. Rounding to equal steps is what a sum of variances asks
for: at 1/128 it adds 0.25 % to the variance of 50 draws and costs 11 bits a position, at 1/256
0.06 % and 13 bits; steps in the logarithm cost more at either. The heaviest head is what the others
leave of the whole, and is not stored. Streams:

    heads [N] | sampled entries [N]
    the other heads' weights, in 1/GRID
    rest       for each position with sampled entries: their mass r, as m * ratio - r with m their
               number; ratio, in the header, is the largest r/m of the sequence (see `_rest`)
    ranks of the heaviest heads | gaps between the other heads' ranks | between the sampled ones'

multinomial. A weight is a count over the number of draws, which stands in the header. Streams:

    entries [N] | counts less one | gaps between ranks

Within a position the order of entries carries nothing, so each group is sorted by rank and gaps are
stored: 6.5 bits a position less on the demo's teacher, of 75.

Shape letters: N positions, E entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megadistill.cache.codec.ragged_rows import (
    arange,
    gaps,
    offsets,
    places,
    ratio,
    repeat,
    rising,
    zeros,
)
from megadistill.cache.codec.rounding import GRID, round_to_grid
from megadistill.cache.codec.symbols import LEVELS, RANKS, SymbolReader, SymbolWriter
from megadistill.errors import CorruptBlockError
from megadistill.targets import SparseTargets

Fields = dict[str, Any]
_MOST_DRAWS = 1 << 16


class VAROPT:
    """Heads with weights of their own, and sampled entries that share one."""

    @staticmethod
    def put(writer: SymbolWriter, t: SparseTargets, ranks_E: np.ndarray) -> int:
        """Append the streams; returns the ratio."""
        assert t.heads is not None
        parts_E, rest_N = round_to_grid(t)
        row_E = np.repeat(np.arange(len(t)), t.counts)
        is_head = arange(len(row_E), row_E) - t.offsets[row_E] < t.heads[row_E]
        head = np.nonzero(is_head & (parts_E > 0))[0]
        drawn = np.nonzero(~is_head & (rest_N[row_E] > 0))[0]
        heads_N = np.bincount(row_E[head], minlength=len(t))
        drawn_N = np.bincount(row_E[drawn], minlength=len(t))

        # The heaviest first, of equal ones the lowest rank; the others by rank.
        head = head[np.lexsort((ranks_E[head], -parts_E[head], row_E[head]))]
        first = (np.cumsum(heads_N) - heads_N)[heads_N > 0]
        heaviest, others = head[first], np.delete(head, first)
        others = _by_rank(others, row_E, ranks_E)
        drawn = _by_rank(drawn, row_E, ranks_E)

        has_N = drawn_N > 0
        parameter = int((-(-rest_N[has_N] * 65536 // drawn_N[has_N])).max(initial=0))
        writer.put(heads_N, LEVELS)
        writer.put(drawn_N, LEVELS)
        writer.put(parts_E[others], LEVELS)
        writer.put(_rest(drawn_N[has_N], parameter) - rest_N[has_N], LEVELS)
        writer.put(ranks_E[heaviest], RANKS)
        writer.put(gaps(ranks_E[others], np.maximum(heads_N - 1, 0)), RANKS)
        writer.put(gaps(ranks_E[drawn], drawn_N), RANKS)
        return parameter

    @staticmethod
    def take(reader: SymbolReader, n: int, parameter: int, truth: bool, file: str) -> Fields:
        """Decodes the streams to fields of SparseTargets; `ranks` in place of ids, and `counts`."""
        heads_N, drawn_N = reader.take(n, LEVELS), reader.take(n, LEVELS)
        led_N, has_N = heads_N > 0, drawn_N > 0
        others_N = heads_N - 1
        others_N[~led_N] = 0
        num_led, num_others, num_drawn = int(led_N.sum()), int(others_N.sum()), int(drawn_N.sum())
        parts = reader.take(num_others, LEVELS)
        rest_N = zeros(n, heads_N)
        rest_N[has_N] = _rest(drawn_N[has_N], parameter) - reader.take(int(has_N.sum()), LEVELS)
        sums = zeros(num_others + 1, heads_N)
        sums[1:] = parts.cumsum(0)
        ends_N = others_N.cumsum(0)
        heaviest_N = GRID - rest_N - (sums[ends_N] - sums[ends_N - others_N])
        empty_N = ~(led_N | has_N)
        sound_N = ((heaviest_N > 0) == led_N) & (heaviest_N >= 0) | empty_N
        sound_N &= (rest_N > 0) == has_N
        if not bool(sound_N.all()) or not bool((parts > 0).all()):
            raise CorruptBlockError(file, f"weights that add up to {GRID}", "others")

        counts_N = heads_N + drawn_N
        starts_N = offsets(counts_N)[:-1]
        total = num_led + num_others + num_drawn
        at_led = starts_N[led_N]
        at_others = places(others_N, starts_N + 1, num_others)
        at_drawn = places(drawn_N, starts_N + heads_N, num_drawn)
        ranks_E = zeros(total, heads_N)
        ranks_E[at_led] = reader.take(num_led, RANKS)
        ranks_E[at_others] = rising(reader.take(num_others, RANKS), others_N, num_others)
        ranks_E[at_drawn] = rising(reader.take(num_drawn, RANKS), drawn_N, num_drawn)
        weights_E = ratio(zeros(total, heads_N), 1)
        weights_E[at_led] = ratio(heaviest_N[led_N], GRID)
        weights_E[at_others] = ratio(parts, GRID)
        shared_N = ratio(rest_N, drawn_N.clip(1) * GRID)
        weights_E[at_drawn] = repeat(shared_N, drawn_N, num_drawn)
        tail_N = ratio(zeros(n, heads_N), 1)
        return {
            "ranks": ranks_E,
            "counts": counts_N,
            "weights": weights_E,
            "tail": tail_N,
            "heads": heads_N,
        }


class MULTINOMIAL:
    """Counts of draws with replacement."""

    @staticmethod
    def put(writer: SymbolWriter, t: SparseTargets, ranks_E: np.ndarray) -> int:
        """Append the streams; returns the number of draws."""
        draws = _draws(t.weights)
        row_E = np.repeat(np.arange(len(t)), t.counts)
        order = _by_rank(np.arange(len(row_E)), row_E, ranks_E)
        counts_E = np.rint(t.weights[order].astype(np.float64) * draws).astype(np.int64)
        writer.put(t.counts, LEVELS)
        writer.put(counts_E - 1, LEVELS)
        writer.put(gaps(ranks_E[order], t.counts), RANKS)
        return draws

    @staticmethod
    def take(reader: SymbolReader, n: int, parameter: int, truth: bool, file: str) -> Fields:
        """Decodes the streams to fields of SparseTargets; `ranks` in place of ids, and `counts`."""
        counts_N = reader.take(n, LEVELS)
        total = int(counts_N.sum())
        hits_E = reader.take(total, LEVELS) + 1
        sums = zeros(total + 1, counts_N)
        sums[1:] = hits_E.cumsum(0)
        ends_N = counts_N.cumsum(0)
        wrong_N = (sums[ends_N] - sums[ends_N - counts_N] != parameter) & (counts_N > 0)
        if bool(wrong_N.any()):
            raise CorruptBlockError(file, f"{parameter} draws a position", "others")
        return {
            "ranks": rising(reader.take(total, RANKS), counts_N, total),
            "counts": counts_N,
            "weights": ratio(hits_E, max(parameter, 1)),
            "tail": ratio(zeros(n, counts_N), 1),
        }


def _rest(drawn: Any, parameter: int) -> Any:
    """The most that `drawn` sampled entries weigh together, in 1/GRID.

    r is near m * tau wherever there are several: what it lacks of that takes 3 bits, r itself 6.
    """
    return (drawn * parameter) >> 16


def _by_rank(entries: np.ndarray, row_E: np.ndarray, ranks_E: np.ndarray) -> np.ndarray:
    """The entries of each row by rising rank."""
    return entries[np.argsort((row_E[entries] << 32) | ranks_E[entries], kind="stable")]


def _draws(weights_E: np.ndarray) -> int:
    """The least number of draws of which all weights are whole parts."""
    weights = np.unique(weights_E).astype(np.float64)
    if not len(weights):
        return 0
    for count in range(1, _MOST_DRAWS):  # of the least likely entry: 1, but by rare accident
        draws = round(count / weights[0]) if weights[0] > 0 else _MOST_DRAWS
        if draws >= _MOST_DRAWS:
            break
        parts = weights * draws
        # A float32 is off by 2^-24 of itself at most.
        if (np.abs(parts - np.rint(parts)) <= parts * 2.0**-23).all():
            return draws
    raise ValueError(f"weights are no counts of fewer than {_MOST_DRAWS} multinomial draws")
