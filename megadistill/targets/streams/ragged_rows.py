"""Ragged rows, in the few operations that numpy and torch call by different names.

Decoding is written once in these and in what both share: indexing, cumsum, arithmetic, comparisons.

Shape letters: N rows, E entries of all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # np.ndarray or torch.Tensor


def repeat(values: Array, counts: Array, total: int) -> Array:
    """Each value counts[i] times, `total` in all."""
    if isinstance(values, np.ndarray):
        return np.repeat(values, counts)
    return values.repeat_interleave(counts, output_size=total)


def arange(n: int, like: Array) -> Array:
    """int64 [n], where `like` is."""
    if isinstance(like, np.ndarray):
        return np.arange(n)
    import torch

    return torch.arange(n, device=like.device)


def zeros(n: int, like: Array) -> Array:
    """int64 [n], where `like` is."""
    if isinstance(like, np.ndarray):
        return np.zeros(n, np.int64)
    import torch

    return torch.zeros(n, dtype=torch.int64, device=like.device)


def ratio(numerators: Array, denominators: Array | int) -> Array:
    """float32: the quotient of integers below 2^53, rounded from float64, the same everywhere."""
    if isinstance(numerators, np.ndarray):
        return (numerators.astype(np.float64) / denominators).astype(np.float32)
    return (numerators.double() / denominators).float()


def like(values: np.ndarray, other: Array) -> Array:
    """`values`, where `other` is."""
    if isinstance(other, np.ndarray):
        return values
    import torch

    return torch.as_tensor(values, device=other.device)


def offsets(counts: Array) -> Array:
    """int64 [N+1]: where each row begins, and where the last one ends."""
    out = zeros(len(counts) + 1, counts)
    out[1:] = counts.cumsum(0)
    return out


def places(counts: Array, starts: Array, total: int) -> Array:
    """int64 [E]: starts[i], starts[i] + 1, ... for the counts[i] entries of each row."""
    before = counts.cumsum(0) - counts
    return arange(total, counts) + repeat(starts - before, counts, total)


def rising(gaps: Array, counts: Array, total: int) -> Array:
    """int64 [E]: numbers that rise within each row, from the gaps between them (see `gaps`)."""
    steps = (gaps + 1).cumsum(0)
    first = counts.cumsum(0) - counts
    # What the rows before add up to: steps just before each row's first entry.
    padded = zeros(total + 1, gaps)
    padded[1:] = steps
    return steps - 1 - repeat(padded[first], counts, total)


def gaps(numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The inverse of `rising`: each row's first number, then differences less one. int64 [E]."""
    out = np.diff(numbers, prepend=0) - 1
    first = (np.cumsum(counts) - counts)[counts > 0]
    out[first] = numbers[first]
    return out


def by_rank(entries: np.ndarray, row_E: np.ndarray, ranks_E: np.ndarray) -> np.ndarray:
    """The entries of each row by rising rank."""
    return entries[np.argsort((row_E[entries] << 32) | ranks_E[entries], kind="stable")]
