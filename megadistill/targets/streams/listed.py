"""Streams of listed targets: topk and topp.

Log-probabilities in steps of 1/16 octave (0.043 nats), rounded to the nearest: a single one is off
by at most 0.022 nats before the row is made to sum to 1 again, 0.044 after, and the KL divergence
that costs is 4e-5 nats on average. Entries stand in falling order, so that what is stored is the
steps between neighbours, 2.5 to 3 bits; those of the places 1, 2-3, 4-7, 8-15, ... have streams
of their own, since neighbours get closer down the list. Sorting by rank instead, with gaps between
ranks and levels as they are, came out 1 % smaller at 4,096 ids and 3 % larger above 100,000.

    entries [N], without the added ground truth
    level of each row's first entry | steps to the next ones, a stream for each octave of places
    level of the tail + 1 [rows with targets], 0 where nothing is left out
    where flagged: 1 for an added ground truth [rows with targets] | its level | its rank
    ranks of all entries

The table of levels is exact in every bit: level q stands for octave[q mod 16] / 2^(32 + q // 16),
and the last one for 0. A row's levels, in units of 2^-40, are added up as integers; every weight is
its level over that sum, in float64, rounded to float32.

Shape letters: N positions, E entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megadistill.errors import CorruptBlockError
from megadistill.targets.sparse import SparseTargets
from megadistill.targets.streams.ragged_rows import like, offsets, places, ratio, repeat, zeros
from megadistill.targets.streams.symbols import LEVELS, RANKS, SymbolReader, SymbolWriter

Fields = dict[str, Any]
STEPS = 16  # levels an octave
# round(2^32 * 2^(-i/16))
_OCTAVE = (
    4294967296,
    4112874773,
    3938502376,
    3771522796,
    3611622603,
    3458501653,
    3311872529,
    3171459999,
    3037000500,
    2908241642,
    2784941738,
    2666869345,
    2553802834,
    2445529972,
    2341847524,
    2242560872,
)
_LAST = 150 * STEPS  # 2^-150, below which float32 knows nothing but 0
_TABLE = np.array([_OCTAVE[q % STEPS] * 2.0 ** (-32 - q // STEPS) for q in range(_LAST)] + [0.0])
_FIXED = 1 << 40
_FIXED_TABLE = np.rint(_TABLE * _FIXED).astype(np.int64)


def put_listed(writer: SymbolWriter, t: SparseTargets, ranks_E: np.ndarray) -> int:
    """Append the streams."""
    has_N = t.counts > 0
    added_N = np.zeros(len(t), bool) if t.truth_added is None else t.truth_added.astype(bool)
    listed_N = t.counts - added_N
    levels_E = _levels(t.weights)
    last = t.offsets[1:][added_N] - 1
    keep = np.ones(len(ranks_E), bool)
    keep[last] = False
    row = np.repeat(np.arange(len(t)), listed_N)
    levels, ranks = levels_E[keep], ranks_E[keep]
    if ((np.diff(levels) < 0) & (np.diff(row) == 0)).any():
        order = np.lexsort((ranks, levels, row))
        levels, ranks = levels[order], ranks[order]
    place = places(listed_N, np.zeros_like(listed_N), len(ranks))
    steps = np.diff(levels, prepend=0)
    writer.put(listed_N, LEVELS)
    writer.put(levels[place == 0], LEVELS)
    for low, high in _octaves(int(listed_N.max(initial=0))):
        writer.put(steps[(place >= low) & (place < high)], LEVELS)
    writer.put(np.where(t.tail > 0, _levels(t.tail) + 1, 0)[has_N], LEVELS)
    if t.truth_added is not None:
        writer.put(added_N[has_N], LEVELS)
        writer.put(levels_E[last], LEVELS)
        writer.put(ranks_E[last], RANKS)
    writer.put(ranks, RANKS)
    return 0


def take_listed(reader: SymbolReader, n: int, truth: bool, file: str) -> Fields:
    """Decodes the streams to fields of SparseTargets; `ranks` in place of ids, and `counts`."""
    listed_N = reader.take(n, LEVELS)
    total = int(listed_N.sum())
    levels_E = _take_levels(reader, listed_N, total, file)
    return _with_rest(reader, listed_N, levels_E, truth, file)


def _take_levels(reader: SymbolReader, listed_N: Any, total: int, file: str) -> Any:
    """int64 [E]: levels, rising within each row."""
    first = reader.take(int((listed_N > 0).sum()), LEVELS)
    place_E = places(listed_N, zeros(len(listed_N), listed_N), total)
    steps_E = zeros(total, listed_N)
    most = int(listed_N.max()) if total else 0
    for low, high in _octaves(most):
        # Places low to high of each row: how many of them there are is known from the rows.
        mask = (place_E >= low) & (place_E < high)
        steps_E[mask] = reader.take(int((listed_N.clip(low, high) - low).sum()), LEVELS)
    sums = steps_E.cumsum(0)
    before_N = zeros(total + 1, listed_N)
    before_N[1:] = sums
    starts_N = listed_N.cumsum(0) - listed_N
    base_N = zeros(len(listed_N), listed_N)
    base_N[listed_N > 0] = first
    levels_E = sums + repeat(base_N - before_N[starts_N], listed_N, total)
    if total and int(levels_E.max()) > _LAST:
        raise CorruptBlockError(file, f"levels up to {_LAST}", int(levels_E.max()))
    return levels_E


def _with_rest(
    reader: SymbolReader, listed_N: Any, levels_E: Any, truth: bool, file: str
) -> Fields:
    n, total = len(listed_N), len(levels_E)
    has_N = listed_N > 0
    num_has = int(has_N.sum())
    codes_N = zeros(n, listed_N)
    codes_N[has_N] = reader.take(num_has, LEVELS)
    table, fixed = like(_TABLE, levels_E), like(_FIXED_TABLE, levels_E)
    if n and int(codes_N.max()) > _LAST + 1:
        raise CorruptBlockError(file, f"levels up to {_LAST}", int(codes_N.max()) - 1)
    tail_N = (codes_N - 1).clip(0)
    tail_fixed_N = fixed[tail_N]
    tail_fixed_N[codes_N == 0] = 0
    added_N = zeros(n, listed_N)
    truth_levels = truth_ranks = zeros(0, listed_N)
    if truth:
        added_N[has_N] = reader.take(num_has, LEVELS)
        num_added = int(added_N.sum())
        truth_levels, truth_ranks = reader.take(num_added, LEVELS), reader.take(num_added, RANKS)
        if bool((added_N > 1).any()) or (num_added and int(truth_levels.max()) > _LAST):
            raise CorruptBlockError(file, "ground truths that were added or not", "others")
    counts_N = listed_N + added_N
    starts_N = offsets(counts_N)[:-1]
    ranks_E = reader.take(total, RANKS)
    if len(truth_ranks):
        at_listed = places(listed_N, starts_N, total)
        at_truth = (starts_N + listed_N)[added_N > 0]
        levels_E = _interleaved(levels_E, at_listed, truth_levels, at_truth)
        ranks_E = _interleaved(ranks_E, at_listed, truth_ranks, at_truth)

    sums = zeros(len(levels_E) + 1, listed_N)
    sums[1:] = fixed.take(levels_E).cumsum(0)
    whole_N = sums[starts_N + counts_N] - sums[starts_N] + tail_fixed_N
    if bool((whole_N[has_N] < 1).any()):
        raise CorruptBlockError(file, "probabilities that add up to 1", "none")
    whole_N[~has_N] = 1
    scale_N = _FIXED / whole_N if isinstance(whole_N, np.ndarray) else _FIXED / whole_N.double()
    weights_E = table.take(levels_E) * repeat(scale_N, counts_N, len(levels_E))
    fields = {
        "ranks": ranks_E,
        "counts": counts_N,
        "weights": _float32(weights_E),
        "tail": ratio(tail_fixed_N, whole_N),
    }
    return fields | ({"truth_added": added_N > 0} if truth else {})


def _interleaved(values: Any, at: Any, others: Any, at_others: Any) -> Any:
    joined = zeros(len(values) + len(others), values)
    joined[at], joined[at_others] = values, others
    return joined


def _levels(probabilities: np.ndarray) -> np.ndarray:
    """int64: the nearest level; the last one for 0 and what is next to it."""
    with np.errstate(divide="ignore"):
        levels = np.rint(-STEPS * np.log2(probabilities.astype(np.float64)))
    return np.clip(levels, 0, _LAST).astype(np.int64)


def _octaves(most: int) -> list[tuple[int, int]]:
    """Places 1, 2 to 3, 4 to 7, ... of rows with up to `most` entries, as half-open ranges."""
    return [(1 << o, 2 << o) for o in range(max(0, most - 1).bit_length())]


def _float32(values: Any) -> Any:
    return values.astype(np.float32) if isinstance(values, np.ndarray) else values.float()
