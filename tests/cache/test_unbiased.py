"""Unbiased: 100,000 draws of selected, decoded and retruncated weights against the probabilities.

Ids with at least 25 expected hits are tested one by one, with the standard error that follows from
the true probability; rarer ones are pooled by octave of probability. Bonferroni over all tests of
one set of draws, at 1e-3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pytest
import torch

from megadistill import decode_targets, encode_targets, select_targets
from megadistill.cache.retruncate import retruncate_targets
from megadistill.storage import counter_rng
from megadistill.targets import SparseTargets, concatenate
from megadistill.targets.methods import varopt

DRAWS, CHUNK = 100_000, 2_500
TAU, LARGER_TAU = 0.05, 0.12
LEVEL, EXPECTED_HITS = 1e-3, 25


def language_model_like(vocab: int, temperature: float, seed: int = 0) -> np.ndarray:
    logits = -np.log(np.arange(vocab) + 2.7) + 3 * np.random.default_rng(seed).normal(size=vocab)
    return np.exp(logits / temperature)


DISTRIBUTIONS = {
    "peaked": language_model_like(1000, 0.5),
    "flat": 1 + 0.2 * np.random.default_rng(1).random(400),
    "zipf": 1 / (np.random.default_rng(2).permutation(700) + 2.7),
    "ties": np.repeat([1.0, 64.0, 8.0, 0.125, 1.0], 100),
    "nearly one-hot": np.append(language_model_like(600, 1.5), 0) / 1e6 + np.eye(601)[123],
}


def log_probs_of(name: str) -> torch.Tensor:
    weights = torch.from_numpy(DISTRIBUTIONS[name])
    return (weights / weights.sum()).log().clamp_min(-80).float()


def probabilities(name: str) -> np.ndarray:
    p = log_probs_of(name).exp().double().numpy()
    return p / p.sum()


def keys(first: int, count: int) -> torch.Tensor:
    n = torch.arange(first, first + count)
    return torch.stack([n // 2048, n % 2048], 1)


@functools.cache
def draw(name: str, **selection) -> SparseTargets:
    rows = log_probs_of(name).expand(CHUNK, -1).contiguous()
    parts = [
        select_targets(rows, keys_N=keys(n, CHUNK), seed=7, entropy=False, **selection).numpy()
        for n in range(0, DRAWS, CHUNK)
    ]
    return concatenate(parts)


def decoded(targets: SparseTargets) -> SparseTargets:
    parts = [targets.rows(n, n + CHUNK) for n in range(0, DRAWS, CHUNK)]
    return concatenate(
        [decode_targets(encode_targets(t, vocab_size=1000), vocab_size=1000) for t in parts]
    )


# What is expected ---------------------------------------------------------------------------------


@dataclass
class Expected:
    """Of one draw: p_V, its standard deviation for each id, and for a pool of ids."""

    p_V: np.ndarray
    std_V: np.ndarray
    hits_V: np.ndarray  # a draw
    pool_std: Callable[[np.ndarray], float]


def of_multinomial(p_V: np.ndarray, draws: int) -> Expected:
    def pool_std(pool: np.ndarray) -> float:
        return float(np.sqrt(p_V[pool].sum() * (1 - p_V[pool].sum()) / draws))

    return Expected(p_V, np.sqrt(p_V * (1 - p_V) / draws), p_V * draws, pool_std)


def step_of(p_V: np.ndarray, tau: float) -> tuple[np.ndarray, float]:
    """(bool [V]: the id is a head; the weight of the others), by the definition."""
    head_V = (p_V >= tau) | (np.arange(len(p_V)) == p_V.argmax())
    while True:
        rest = p_V[~head_V].sum()
        step = rest / np.ceil(rest / tau) if rest > 0 else 0.0
        more_V = head_V | (p_V > step)
        if (more_V == head_V).all():
            return head_V, step
        head_V = more_V


def of_varopt(p_V: np.ndarray, tau: float) -> Expected:
    head_V, step = step_of(p_V, tau)
    share_V = np.where(head_V, 0, p_V) / step  # chance to be drawn

    def pool_std(pool: np.ndarray) -> float:
        """Exact: an id is drawn where the random start falls into its part of the circle."""
        begin, length = (np.cumsum(share_V) - share_V)[pool] % 1, share_V[pool]
        end = begin + length
        at = np.concatenate([[0], begin, end % 1, [1]])
        change = np.concatenate([[(end > 1).sum()], np.ones(len(pool)), -np.ones(len(pool)), [0]])
        order = np.argsort(at, kind="stable")
        drawn, width = np.cumsum(change[order])[:-1], np.diff(at[order])
        return float(step * np.sqrt(max(0, (drawn**2 * width).sum() - length.sum() ** 2)))

    std_V = np.where(head_V, 0, np.sqrt(p_V * np.maximum(step - p_V, 0)))
    return Expected(p_V, std_V, np.where(head_V, 1, share_V), pool_std)


def of_retruncated(p_V: np.ndarray, tau: float, targets: SparseTargets) -> Expected:
    """No weight below tau's heads is above tau, so the variance is at most p (tau - p)."""
    row_E = np.repeat(np.arange(len(targets)), targets.counts)

    def pool_std(pool: np.ndarray) -> float:
        weights = np.where(np.isin(targets.ids, pool), targets.weights, 0)
        return float(np.bincount(row_E, weights, minlength=len(targets)).std())

    std_V = np.sqrt(p_V * np.maximum(tau - p_V, 0))
    return Expected(p_V, std_V, np.minimum(p_V / tau, 1), pool_std)


# The test -----------------------------------------------------------------------------------------


def pools(expected: Expected) -> list[np.ndarray]:
    """The rare ids by octave of probability; octaves of too few hits join the next larger one."""
    rare = np.nonzero(expected.hits_V * DRAWS < EXPECTED_HITS)[0]
    rare = rare[expected.p_V[rare] > 0]
    octave = np.floor(np.log2(expected.p_V[rare]))
    found, waiting = [], np.zeros(0, int)
    for value in np.unique(octave):
        waiting = np.append(waiting, rare[octave == value])
        if expected.hits_V[waiting].sum() * DRAWS >= EXPECTED_HITS:
            found.append(waiting)
            waiting = waiting[:0]
    if len(waiting) and found:
        found[-1] = np.append(found[-1], waiting)
    return found


def wrong(targets: SparseTargets, expected: Expected, *, rounding_V: np.ndarray | float = 0) -> int:
    """How many ids and pools have a mean weight that is not the probability.

    rounding_V: variances that a codec adds to an id's mean.
    """
    V = len(expected.p_V)
    mean_V = np.bincount(targets.ids, targets.weights.astype(np.float64), minlength=V) / DRAWS
    rounding_V = np.broadcast_to(rounding_V, V)
    frequent = np.nonzero(expected.hits_V * DRAWS >= EXPECTED_HITS)[0]
    groups = pools(expected)
    limit = NormalDist().inv_cdf(1 - LEVEL / 2 / (len(frequent) + len(groups)))
    error = np.abs(mean_V - expected.p_V)[frequent]
    std = np.sqrt(expected.std_V[frequent] ** 2 / DRAWS + rounding_V[frequent])
    bad = int((error > limit * std + 1e-7).sum())
    for pool in groups:
        std = np.sqrt(expected.pool_std(pool) ** 2 / DRAWS + rounding_V[pool].sum())
        bad += abs(mean_V[pool].sum() - expected.p_V[pool].sum()) > limit * std + 1e-7
    return bad


def rounding_variance(before: SparseTargets, after: SparseTargets, vocab: int) -> np.ndarray:
    """[V]: variance of an id's mean weight by what encoding and decoding did to each weight.

    An entry that was rounded to nothing is not there any more.
    """
    places = [np.repeat(np.arange(DRAWS), t.counts) * vocab + t.ids for t in (before, after)]
    found, entry = np.unique(np.concatenate(places), return_inverse=True)
    assert len(found) == len(places[0])  # no id is new
    changed = np.bincount(entry, np.concatenate([-before.weights, after.weights]))
    return np.bincount(found % vocab, changed**2, minlength=vocab) / DRAWS**2


def with_hits_of(targets: SparseTargets, expected: Expected) -> Expected:
    """Rounding makes of many light entries few heavier ones: so many hits are left at least."""
    heaviest = targets.weights[~is_head(targets)].max()
    hits_V = np.minimum(expected.hits_V, expected.p_V / heaviest)
    return dataclasses.replace(expected, hits_V=hits_V)


def is_head(targets: SparseTargets) -> np.ndarray:
    place = np.arange(len(targets.ids)) - np.repeat(targets.offsets[:-1], targets.counts)
    return place < np.repeat(targets.heads, targets.counts)


def assert_sums_to_one(targets: SparseTargets) -> None:
    rows = np.repeat(np.arange(DRAWS), targets.counts)
    sums = np.bincount(rows, targets.weights.astype(np.float64), minlength=DRAWS)
    assert np.abs(sums - 1).max() < 1e-6


@pytest.fixture(scope="module", params=list(DISTRIBUTIONS))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def varopt_draws(name) -> SparseTargets:
    return draw(name, method="varopt", tau=TAU)


@pytest.fixture(scope="module")
def decoded_draws(varopt_draws) -> SparseTargets:
    return decoded(varopt_draws)


def test_varopt_is_unbiased_as_selected_and_as_decoded(name, varopt_draws, decoded_draws):
    p_V = probabilities(name)
    expected = of_varopt(p_V, TAU)
    assert_sums_to_one(varopt_draws)
    assert wrong(varopt_draws, expected) == 0
    rounding_V = rounding_variance(varopt_draws, decoded_draws, len(p_V))
    assert_sums_to_one(decoded_draws)
    assert wrong(decoded_draws, with_hits_of(decoded_draws, expected), rounding_V=rounding_V) == 0


def test_varopt_heads_are_the_probabilities(name, varopt_draws):
    p_V = probabilities(name)
    head_V, step = step_of(p_V, TAU)
    head_E = is_head(varopt_draws)
    assert set(varopt_draws.ids[head_E].tolist()) == set(np.nonzero(head_V)[0].tolist())
    assert np.abs(varopt_draws.weights - p_V[varopt_draws.ids])[head_E].max() < 1e-6
    assert np.abs(varopt_draws.weights - step)[~head_E].max(initial=0) < 1e-6


def test_retruncated_varopt_is_unbiased(name, varopt_draws, decoded_draws):
    p_V = probabilities(name)
    fewer = retruncate_targets(decoded_draws, tau=LARGER_TAU, keys_N=keys(0, DRAWS).numpy(), seed=7)
    assert len(fewer.ids) < 0.8 * len(decoded_draws.ids) or name == "nearly one-hot"
    assert_sums_to_one(fewer)
    rounding_V = rounding_variance(varopt_draws, decoded_draws, len(p_V))
    assert wrong(fewer, of_retruncated(p_V, LARGER_TAU, fewer), rounding_V=rounding_V) == 0
    # And coded once more, as the retruncated cache holds it.
    again = decoded(fewer)
    rounding_V = rounding_V + rounding_variance(fewer, again, len(p_V))
    assert_sums_to_one(again)
    assert wrong(again, of_retruncated(p_V, LARGER_TAU, again), rounding_V=rounding_V) == 0


def test_multinomial_is_unbiased_as_selected_and_as_decoded(name):
    targets = draw(name, method="multinomial", draws=20)
    p_V = probabilities(name)
    expected = of_multinomial(p_V, 20)
    assert_sums_to_one(targets)
    assert wrong(targets, expected) == 0
    after = decoded(targets)
    assert_sums_to_one(after)
    assert wrong(after, expected, rounding_V=rounding_variance(targets, after, len(p_V))) == 0


# That the test can fail ---------------------------------------------------------------------------


def test_a_start_used_for_selecting_and_for_retruncating_is_found(monkeypatch):
    targets = draw("zipf", method="varopt", tau=TAU)
    monkeypatch.setattr(
        varopt,
        "uniforms",
        lambda keys_N, _, *, seed, purpose: counter_rng.uniform(
            keys_N, seed=seed, purpose=counter_rng.SELECT
        )[:, None],
    )
    fewer = retruncate_targets(targets, tau=LARGER_TAU, keys_N=keys(0, DRAWS).numpy(), seed=7)
    assert wrong(fewer, of_retruncated(probabilities("zipf"), LARGER_TAU, fewer)) > 100


def test_a_start_used_for_selecting_and_for_rounding_is_found():
    targets, p_V = draw("nearly one-hot", method="varopt", tau=TAU), probabilities("nearly one-hot")
    again = counter_rng.uniform(keys(0, DRAWS).numpy(), seed=7, purpose=counter_rng.SELECT) >> 12
    after = decoded(dataclasses.replace(targets, rounding=again))
    expected = with_hits_of(after, of_varopt(p_V, TAU))
    assert wrong(after, expected, rounding_V=rounding_variance(targets, after, len(p_V))) > 0


def test_retruncating_twice_needs_another_draw_the_second_time():
    targets = draw("zipf", method="varopt", tau=TAU)
    key = {"keys_N": keys(0, DRAWS).numpy(), "seed": 7}
    once = retruncate_targets(targets, tau=0.09, **key)
    found = []
    for times in (1, 0):
        twice = retruncate_targets(once, tau=0.16, times=times, **key)
        found.append(wrong(twice, of_retruncated(probabilities("zipf"), 0.16, twice)))
    assert found[0] == 0
    assert found[1] > 100


def test_weights_that_are_rounded_down_by_a_hundredth_are_found():
    targets = draw("zipf", method="varopt", tau=TAU)
    weights = targets.weights.copy()
    weights[~is_head(targets)] *= 0.99
    # The largest head is one minus the rest, so that the sums stay 1.
    sums = np.bincount(np.repeat(np.arange(DRAWS), targets.counts), weights, minlength=DRAWS)
    weights[targets.offsets[:-1]] += (1 - sums).astype(np.float32)
    rounded = dataclasses.replace(targets, weights=weights)
    assert_sums_to_one(rounded)
    assert wrong(rounded, of_varopt(probabilities("zipf"), TAU)) > 0
