"""Statistics of targets in a block's marker: counts that add up exactly.

Counts, fixed-point integer sums and fixed-bin histograms of decoded values, so that the whole of a
merged cache equals the sum of its parts in any order, and checking recomputes it to the last digit.
Quantiles come from the bins.

    sequences, positions      positions: those that have targets
    entries, bytes            bytes: of the targets column, all of it
    entries_histogram         positions by their number of entries, as {"6": 120}
    listed_mass               sum over positions, in units of 2^-40; left out for multinomial
    listed_mass_histogram     256 equal bins from 0 to 1, trailing empty ones left out
    entropy_codes, nll_codes  positions by level code (quantizer.py), trailing empty ones left out
    truth_added               topk, topp: positions whose ground truth had to be added
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megadistill.cache.quantizer import LEVELS, NONE, NUMERATORS, UNIT, to_codes
from megadistill.targets import SparseTargets, concatenate, sparse_method

Statistics = dict[str, Any]
FIXED = 1 << 40
_BINS = 256


def block_statistics(targets: list[SparseTargets], sizes: list[int]) -> Statistics:
    """The statistics of a block: its sequences' decoded targets, and their sizes in bytes."""
    t = concatenate(targets)
    counts = np.diff(t.offsets)
    has = counts > 0
    numbers, positions = np.unique(counts[has], return_counts=True)
    statistics: Statistics = {
        "sequences": len(targets),
        "positions": int(has.sum()),
        "entries": int(counts.sum()),
        "bytes": sum(sizes),
        "entries_histogram": {
            str(k): n for k, n in zip(numbers.tolist(), positions.tolist(), strict=True)
        },
    }
    if sparse_method(t.method).reports_listed_mass:
        mass = listed_mass(t)[has]
        bins = np.clip(mass * _BINS // FIXED, 0, _BINS - 1)
        statistics["listed_mass"] = int(mass.sum())
        statistics["listed_mass_histogram"] = _histogram(bins)
    for name, values in (("entropy_codes", t.entropy), ("nll_codes", t.nll)):
        if values is not None:
            codes = to_codes(values)
            statistics[name] = _histogram(codes[has & (codes != NONE)])
    if t.truth_added is not None:
        statistics["truth_added"] = int(t.truth_added.sum())
    return statistics


def listed_mass(t: SparseTargets) -> np.ndarray:
    """int64 [N], units of 2^-40: what the list holds; of varopt, its heads.

    Every weight becomes an integer first: sums are then the same in any order.
    """
    if t.heads is None:
        return FIXED - np.rint(t.tail.astype(np.float64) * FIXED).astype(np.int64)
    counts = np.diff(t.offsets)
    place = np.arange(len(t.ids)) - np.repeat(t.offsets[:-1], counts)
    fixed = np.rint(t.weights.astype(np.float64) * FIXED).astype(np.int64)
    fixed[place >= np.repeat(t.heads, counts)] = 0
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(fixed)])
    return sums[t.offsets[1:]] - sums[t.offsets[:-1]]


def combine(parts: list[Statistics]) -> Statistics:
    """The statistics of several blocks together: everything is added, member by member."""
    whole: Statistics = {}
    for part in parts:
        whole = _add(whole, part)
    return whole


def summary(statistics: Statistics) -> dict[str, Any]:
    """Returns averages and quantiles, for people, over the positions that have targets.

    listed_mass, entropy and teacher_nll are {mean, p05, p50, p95} (probability; nats), or None
    where they were not kept.
    """
    positions = statistics.get("positions", 0)
    centers = [(b + 0.5) / _BINS for b in range(_BINS)]
    levels = LEVELS[:NONE].tolist()
    mass = statistics.get("listed_mass_histogram")
    return {
        "num_positions": positions,
        "entries_per_position": _ratio(statistics.get("entries", 0), positions),
        "bytes_per_position": _ratio(statistics.get("bytes", 0), positions),
        "listed_mass": _quantiles(mass, centers, statistics.get("listed_mass", 0), FIXED),
        "entropy": _levels(statistics.get("entropy_codes"), levels),
        "teacher_nll": _levels(statistics.get("nll_codes"), levels),
    }


def _histogram(codes: np.ndarray) -> list[int]:
    return np.bincount(codes).tolist() if len(codes) else []


def _add(left: Any, right: Any) -> Any:
    if isinstance(right, dict):
        return {
            k: _add(left[k], right[k]) if k in left and k in right else (left | right)[k]
            for k in left | right
        }
    if isinstance(right, list):
        longest = max(len(left), len(right))
        pad = [values + [0] * (longest - len(values)) for values in (left, right)]
        return [a + b for a, b in zip(*pad, strict=True)]
    return left + right


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _levels(codes: list[int] | None, levels: list[float]) -> dict[str, float] | None:
    if codes is None:
        return None
    total = sum(n * NUMERATORS[c] for c, n in enumerate(codes))
    return _quantiles(codes, levels, total, UNIT)


def _quantiles(
    histogram: list[int] | None, values: list[float], total: int, unit: int
) -> dict[str, float] | None:
    if not histogram or not sum(histogram):
        return None
    below, count = np.cumsum(histogram), sum(histogram)
    found = {"mean": total / unit / count}
    for name, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        found[name] = values[int(np.searchsorted(below, share * count))]
    return found
