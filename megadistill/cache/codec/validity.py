"""Checks of targets that are to be encoded, before anything is written."""

from __future__ import annotations

import numpy as np

from megadistill.targets import SparseTargets, sparse_method


class NonFiniteError(ValueError):
    """Targets hold a value that is no probability, entropy or nll."""

    def __init__(self, position: int, name: str, value: float) -> None:
        super().__init__(f"position {position}: {name} is {value}")
        self.position, self.name, self.value = position, name, value


def check_targets(t: SparseTargets, vocab_size: int) -> None:
    """NonFiniteError or ValueError for targets that are not what their method says."""
    counts = t.counts
    if t.offsets[0] != 0 or t.offsets[-1] != len(t.ids) or (counts < 0).any():
        raise ValueError("offsets must rise from 0 to the number of ids")
    if len(t) >= 1 << 29:
        raise ValueError(f"{len(t)} positions, expected fewer than 2^29")
    if len(t.ids) and (t.ids.min() < 0 or t.ids.max() >= vocab_size):
        low, high = t.ids.min(), t.ids.max()
        raise ValueError(f"ids go from {low} to {high}, expected 0 to {vocab_size - 1}")
    _finite(t.weights, counts, "weight")
    _finite(t.tail, None, "tail")
    if t.entropy is not None:
        _finite(np.where(counts > 0, t.entropy, 0), None, "entropy")
    if t.nll is not None:
        _finite(np.where(np.isnan(t.nll), 0, t.nll), None, "nll")
    method = sparse_method(t.method)
    if method.sampled:
        _check_sampled(t, counts)
    elif t.truth_added is not None and (t.truth_added & (counts < 2)).any():
        raise ValueError("a ground truth is added to at least one entry")
    if (t.heads is not None) != method.has_heads:
        has = "have heads" if method.has_heads else "have no heads"
        raise ValueError(
            f"{t.method} targets {has}, found {'none' if method.has_heads else 'some'}"
        )
    if t.heads is not None:
        if (t.heads < 0).any() or (t.heads > counts).any():
            raise ValueError("heads must be between 0 and the entries of their position")
        _check_shared(t, counts)


def _check_sampled(t: SparseTargets, counts: np.ndarray) -> None:
    if t.truth_added is not None:
        raise ValueError(f"{t.method} targets have no added ground truth")
    if t.tail.any():
        raise ValueError(f"{t.method} targets leave nothing out, found a tail")
    sums = np.concatenate([np.zeros(1), np.cumsum(t.weights.astype(np.float64))])
    sums_N = sums[t.offsets[1:]] - sums[t.offsets[:-1]]
    wrong = (counts > 0) & (np.abs(sums_N - 1) > 1e-3)
    if wrong.any():
        n = int(np.argmax(wrong))
        raise ValueError(f"position {n}: weights sum to {sums_N[n]}, expected 1")


def _check_shared(t: SparseTargets, counts: np.ndarray) -> None:
    assert t.heads is not None
    place = np.arange(len(t.ids)) - np.repeat(t.offsets[:-1], counts)
    is_sampled = place >= np.repeat(t.heads, counts)
    drawn = counts - t.heads
    first = (t.offsets[:-1] + t.heads)[drawn > 0]
    if not np.array_equal(t.weights[is_sampled], np.repeat(t.weights[first], drawn[drawn > 0])):
        raise ValueError("the sampled entries of a position must share one weight")


def _finite(values: np.ndarray, counts: np.ndarray | None, name: str) -> None:
    bad = ~(np.isfinite(values) & (values >= 0))
    # A float32 entropy or nll may round to just below zero; that is no error of the teacher's.
    if name in ("entropy", "nll"):
        bad &= ~(np.abs(values) < 1e-3)
    if bad.any():
        first = int(np.argmax(bad))
        position = (
            first if counts is None else int(np.repeat(np.arange(len(counts)), counts)[first])
        )
        raise NonFiniteError(position, name, float(values[first]))
