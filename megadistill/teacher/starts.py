"""Random starts that are a function of what they are for, and of nothing else.

Counter-based: (seed, purpose, sequence number, position) goes through splitmix64's finaliser, word
by word, in integers that wrap around alike on every device. So a draw is the same at any number of
ranks, in any order, and after any interruption. Two purposes never share a start: reusing one
gives weights that are wrong by up to 196 %.

Shape letter: N positions.
"""

from __future__ import annotations

import torch

SELECT, ROUND, TRUNCATE = 1, 2, 3  # purposes


def uniform(keys_N: torch.Tensor, *, seed: int, purpose: int) -> torch.Tensor:
    """int64 [N], uniform in [0, 2^44): splitmix64 over (seed, purpose, sequence, position)."""
    state = torch.full_like(keys_N[:, 0], _signed(seed))
    for word in (torch.full_like(state, purpose), keys_N[:, 0], keys_N[:, 1]):
        state = _splitmix(state ^ _splitmix(word))
    return (state >> 20) & ((1 << 44) - 1)


def below(limit_N: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """int64 [N]: floor(limit * uniform / 2^44), in [0, limit); in halves, since limit < 2^41."""
    high, low = uniform_N >> 22, uniform_N & ((1 << 22) - 1)
    return (limit_N * high + ((limit_N * low) >> 22)) >> 22


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64, whose products wrap around as unsigned ones do."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
