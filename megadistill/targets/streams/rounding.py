"""Rounding without bias: a position's weights to whole GRID-ths that add up to the whole.

Systematic rounding: the running sum of the heads' weights, with the sampled mass last, is rounded
up or down with one random start for the position, and each weight is the difference between two
such sums. So E[rounded] = weight for each of them, none is off by a whole step, none is negative,
and they add up to exactly 1.

The start is the targets' own `rounding`, which selecting draws for each position apart from what it
chose the entries with; where it is absent, a hash of what is encoded stands in.

Shape letters: N positions, E entries.
"""

from __future__ import annotations

import numpy as np
import xxhash

from megadistill.storage.counter_rng import outputs
from megadistill.targets.sparse import SparseTargets

GRID = 128
_FIXED = 1 << 40
# Weights that were rounded before come as float32, off by 6e-8 at most: they stay as they are.
_EXACT = 1 << 18


def round_to_grid(t: SparseTargets) -> tuple[np.ndarray, np.ndarray]:
    """(heads' weights in 1/GRID, int64 [E], 0 for sampled entries; sampled mass, int64 [N])."""
    assert t.heads is not None
    counts_N = t.counts
    row_E = np.repeat(np.arange(len(t)), counts_N)
    is_head = np.arange(len(row_E)) - t.offsets[row_E] < t.heads[row_E]
    fixed_E = np.rint(t.weights.astype(np.float64) * _FIXED).astype(np.int64)
    total_N = _row_sums(fixed_E, t.offsets)
    heads_E = np.where(is_head, fixed_E, 0)
    upto_E = np.cumsum(heads_E)
    before_N = np.concatenate([np.zeros(1, np.int64), upto_E])[t.offsets[:-1]]
    upto_E -= before_N[row_E]
    start_N = _start(t)

    def rounded(sum_: np.ndarray, row: np.ndarray) -> np.ndarray:
        total = total_N[row]
        steps = sum_ * GRID
        nearest = (steps + total // 2) // total * total
        steps = np.where(np.abs(steps - nearest) < _EXACT * GRID, nearest, steps)
        return (steps + ((start_N[row] * (total >> 10)) >> 22)) // total

    ends_E, starts_E = rounded(upto_E, row_E), rounded(upto_E - heads_E, row_E)
    parts_E = np.where(is_head, ends_E - starts_E, 0)
    rest_N = np.where(counts_N > 0, GRID - _row_sums(parts_E, t.offsets), 0)
    return parts_E, rest_N


def _start(t: SparseTargets) -> np.ndarray:
    """int64 [N] in [0, 2^32)."""
    if t.rounding is not None:
        return t.rounding.astype(np.int64)
    digest = xxhash.xxh3_64(np.ascontiguousarray(t.ids).tobytes())
    digest.update(np.ascontiguousarray(t.weights).tobytes())
    return (outputs(digest.intdigest(), np.arange(len(t))) >> 32) & 0xFFFFFFFF


def _row_sums(values_E: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(values_E)])
    return sums[offsets[1:]] - sums[offsets[:-1]]
