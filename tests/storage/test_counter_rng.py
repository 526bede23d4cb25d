"""One splitmix64 for Python integers, numpy and torch, against the published generator."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megadistill.storage.counter_rng import (
    ROUND,
    SELECT,
    TRUNCATE,
    key,
    outputs,
    permutation,
    uniform,
    uniforms,
)
from megadistill.targets.streams.rounding import _start

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
KEYS_N = np.array([[0, 0], [1, 0], [0, 1], [123456789, 2047], [-3, 5]], np.int64)


def splitmix64(state: int) -> tuple[int, int]:
    """(next state, output), as published by Vigna: https://prng.di.unimi.it/splitmix64.c."""
    state = (state + GOLDEN) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def test_outputs_are_those_of_the_published_generator():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    state, found = 1234567, []
    for _ in published:
        state, word = splitmix64(state)
        found.append(word)
    assert found == published
    assert outputs(1234567, np.arange(1, 6)).view(np.uint64).tolist() == published


@pytest.mark.parametrize("parts", [(), (0,), (7, 3), (-1, 2**63, 5), (2**64 + 1, -(2**70))])
def test_a_key_chains_the_outputs(parts):
    state = 0
    for part in parts:
        state = splitmix64(state ^ (part & MASK))[1]
    assert key(*parts) == state


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 + 11])
def test_uniform_numbers_are_the_upper_bits_of_a_chain_in_numpy_and_torch(seed):
    def chain(*words):
        state = seed & MASK
        for word in words:
            state = splitmix64(state ^ splitmix64(word & MASK)[1])[1]
        return state >> 20

    expected = [chain(SELECT, *row) for row in KEYS_N.tolist()]
    assert uniform(KEYS_N, seed=seed, purpose=SELECT).tolist() == expected
    assert uniform(torch.from_numpy(KEYS_N), seed=seed, purpose=SELECT).tolist() == expected
    draws = [[chain(TRUNCATE, *row, draw) for draw in range(3)] for row in KEYS_N.tolist()]
    assert uniforms(KEYS_N, np.arange(3), seed=seed, purpose=TRUNCATE).tolist() == draws


def test_numbers_are_those_that_stores_and_orders_were_made_with():
    assert key(1, 2, 3, 4) == 15374388949593934587
    assert permutation(12, 7, 3).tolist() == [7, 2, 0, 11, 9, 5, 3, 10, 4, 8, 6, 1]
    order = permutation(100_000, -5, 9).astype("<i8").tobytes()
    assert hashlib.sha256(order).hexdigest()[:16] == "e4de61bf5b56fc47"
    found = uniform(KEYS_N, seed=-1, purpose=ROUND).tolist()
    assert found == [8170988665478, 3864480540053, 13150498354812, 15392575345769, 3618487777785]


def test_the_start_of_rounding_without_one_of_its_own_is_what_it_was():
    class Targets(SimpleNamespace):
        def __len__(self) -> int:
            return 4

    weights = np.linspace(0, 1, 5, dtype=np.float32)
    targets = Targets(rounding=None, ids=np.arange(5), weights=weights)
    assert _start(targets).tolist() == [4216594861, 4115207426, 3107378211, 4293967065]
