"""Counter-based random numbers: pure functions of integers, equal on every machine and device.

A start is a function of what it is for: (seed, purpose, sequence number, position) goes through
splitmix64's finaliser, word by word, in integers that wrap around alike in torch, in numpy and in
Python. So a draw is the same at any number of ranks, in any order, and after any interruption. Two
purposes never share a start: reusing one gives weights that are wrong by up to 196 %.

Permutations come from the same numbers: orders of documents and of training.

Shape letters: N positions, M draws of a position.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SELECT, ROUND, TRUNCATE, TRUNCATE_ROUND = 1, 2, 3, 4  # purposes

Array = Any  # torch.Tensor or np.ndarray, int64
_MASK = (1 << 64) - 1


def uniform(keys_N: Array, *, seed: int, purpose: int) -> Array:
    """int64 [N], uniform in [0, 2^44): splitmix64 over (seed, purpose, sequence, position)."""
    return _upper(_state(keys_N, seed=seed, purpose=purpose))


def uniforms(keys_N: Array, draws_M: Array, *, seed: int, purpose: int) -> Array:
    """int64 [N, M], the same with the number of the draw as one word more."""
    state_N = _state(keys_N, seed=seed, purpose=purpose)
    return _upper(_splitmix(state_N[:, None] ^ _splitmix(draws_M)))


def below(limit: Array, uniform: Array) -> Array:
    """int64: floor(limit * uniform / 2^44), in [0, limit); in halves, since limit < 2^41."""
    high, low = uniform >> 22, uniform & ((1 << 22) - 1)
    return (limit * high + ((limit * low) >> 22)) >> 22


def _state(keys_N: Array, *, seed: int, purpose: int) -> Array:
    zero = keys_N[:, 0] * 0
    state = zero + _signed(seed)
    for word in (zero + purpose, keys_N[:, 0], keys_N[:, 1]):
        state = _splitmix(state ^ _splitmix(word))
    return state


def _upper(state: Array) -> Array:
    return (state >> 20) & ((1 << 44) - 1)


def key(*parts: int) -> int:
    """Returns a 64-bit key for integers of any sign; the order of the parts matters."""
    state = 0
    for part in parts:
        state = _splitmix(state ^ _signed(part))
    return state & _MASK


def permutation(length: int, *parts: int) -> np.ndarray:
    """int64 [length]: 0 .. length - 1 in an order that depends on `parts` alone.

    numpy promises the bits of its generators, but not the order that `Generator.permutation` makes
    of them (NEP 19), so an order that is a contract cannot come from there.
    """
    # The finaliser is a bijection and the counters differ, so there are no ties to break.
    return np.argsort(outputs(key(*parts), np.arange(1, length + 1)).view(np.uint64))


def outputs(start: int, counters_N: np.ndarray) -> np.ndarray:
    """int64 [N]: the 64 bits that splitmix64 gives `counters_N` steps after the state `start`."""
    return _finalise(_signed(start) + counters_N * _GOLDEN)


def _splitmix(x: Array) -> Array:
    return _finalise(_wrapped(x + _GOLDEN))


def _finalise(x: Array) -> Array:
    """splitmix64's finaliser on int64: an array of numpy or torch, or a Python integer.

    Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014. Products of int64
    wrap around to the same bits as unsigned ones; the masks make the shifts logical.
    """
    x = _wrapped((x ^ ((x >> 30) & ((1 << 34) - 1))) * _FIRST)
    x = _wrapped((x ^ ((x >> 27) & ((1 << 37) - 1))) * _SECOND)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _wrapped(x: Array) -> Array:
    """An array wraps around by itself; a Python integer has no end."""
    return _signed(x) if isinstance(x, int) else x


def _signed(word: int) -> int:
    """The int64 with the low 64 bits of an integer."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


_GOLDEN, _FIRST, _SECOND = map(
    _signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
