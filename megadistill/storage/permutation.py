"""Counter-based pseudo-random numbers: pure functions of integers, equal on every machine.

numpy promises the bits of its generators but not the order that `Generator.permutation` makes of
them (NEP 19), and an order that changes with a library version could not be a contract. So orders
come from splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def key(*parts: int) -> int:
    """Returns a 64-bit key for integers of any sign; the order of the parts matters."""
    state = 0
    for part in parts:
        state = _mix_int(((state ^ (part & _MASK)) + _GOLDEN) & _MASK)
    return state


def permutation(length: int, *parts: int) -> np.ndarray:
    """int64 [length]: 0 .. length - 1 in an order that depends on `parts` alone."""
    counter = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(
        key(*parts)
    )
    # The finaliser is a bijection and the counters differ, so there are no ties to break.
    return np.argsort(_mix(counter))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
