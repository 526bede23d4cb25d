"""varopt against multinomial, by their exact variances: no draw is made for those.

The variance of a position is the sum over ids of Var[weight]; what the gradient of a cross-entropy
inherits is proportional to it.

Shape letters: N positions, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megadistill import select_targets


def multinomial_variance(p_NV: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """(variance, expected entries), each [N]."""
    return (p_NV * (1 - p_NV)).sum(1) / draws, (1 - (1 - p_NV) ** draws).sum(1)


def varopt_variance(p_NV: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """(variance, entries), each [N]. An id that is no head weighs r/m with probability p m/r."""
    sorted_NV = -np.sort(-p_NV, axis=1)
    rest_NV = p_NV.sum(1, keepdims=True) - np.cumsum(sorted_NV, 1) + sorted_NV
    variance, entries = np.empty(len(p_NV)), np.empty(len(p_NV))
    for n, (p, rest) in enumerate(zip(sorted_NV, rest_NV, strict=True)):
        heads = max(1, int((p >= tau).sum()))
        while p[heads] * np.ceil(rest[heads] / tau) > rest[heads]:
            heads += 1
        points = np.ceil(rest[heads] / tau)
        variance[n] = rest[heads] ** 2 / max(points, 1) - (p[heads:] ** 2).sum()
        entries[n] = heads + points
    return variance, entries


def tau_of_entries(p_NV: np.ndarray, entries: float) -> float:
    """The tau at which varopt keeps so many entries on average: bisection in its logarithm."""
    low, high = 1e-4, 1.0
    for _ in range(16):
        middle = (low * high) ** 0.5
        low, high = (
            (middle, high) if varopt_variance(p_NV, middle)[1].mean() > entries else (low, middle)
        )
    return high


def language_model_like(positions: int, vocab: int, temperature: tuple[float, float]) -> np.ndarray:
    rng = np.random.default_rng(0)
    logits = -np.log(np.arange(vocab) + 2.7) + 3 * rng.normal(size=(positions, vocab))
    logits /= rng.uniform(*temperature, size=(positions, 1))
    p_NV = np.exp(logits - logits.max(1, keepdims=True))
    return p_NV / p_NV.sum(1, keepdims=True)


@pytest.mark.parametrize("vocab", [2_000, 12_000])
def test_at_equal_entries_varopt_has_a_third_of_the_variance_of_multinomial(vocab):
    p_NV = language_model_like(60, vocab, (0.25, 0.75))
    variance, entries = multinomial_variance(p_NV, 50)
    tau = tau_of_entries(p_NV, entries.mean())
    best, kept = varopt_variance(p_NV, tau)
    assert kept.mean() <= entries.mean()
    assert best.mean() <= variance.mean() / 3


@pytest.mark.parametrize(
    ("method", "parameters"), [("varopt", {"tau": 0.06}), ("multinomial", {"draws": 50})]
)
def test_what_is_drawn_has_the_variance_and_the_entries_worked_out(method, parameters):
    draws = 4000
    p_NV = language_model_like(2, 500, (0.5, 0.7))
    for p_V in p_NV:
        rows = torch.from_numpy(p_V).log().float().expand(draws, -1).contiguous()
        keys = torch.stack([torch.arange(draws), torch.arange(draws) % 7], 1)
        targets = select_targets(rows, method=method, keys_N=keys, **parameters).numpy()
        squares = np.bincount(targets.ids, targets.weights**2, minlength=500) / draws
        found = (squares - p_V**2).sum()
        worked_out = varopt_variance if method == "varopt" else multinomial_variance
        variance, entries = worked_out(p_V[None], *parameters.values())
        assert found == pytest.approx(variance[0], rel=0.05, abs=1e-5)
        assert len(targets.ids) / draws == pytest.approx(entries[0], rel=0.02)
