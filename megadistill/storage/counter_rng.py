"""Random starts that are a function of what they are for, and of nothing else.

Counter-based: (seed, purpose, sequence number, position) goes through splitmix64's finaliser, word
by word, in integers that wrap around alike on every device, in torch and in numpy. So a draw is the
same at any number of ranks, in any order, and after any interruption. Two purposes never share a
start: reusing one gives weights that are wrong by up to 196 %.

Shape letters: N positions, M draws of a position.
"""

from __future__ import annotations

from typing import Any

SELECT, ROUND, TRUNCATE, TRUNCATE_ROUND = 1, 2, 3, 4  # purposes

Array = Any  # torch.Tensor or np.ndarray, int64


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


def _splitmix(x: Array) -> Array:
    """splitmix64's finaliser on int64, whose products wrap around as unsigned ones do."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
