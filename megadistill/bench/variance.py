"""The variance of sampled targets, exactly: summed over the vocabulary, averaged over positions.

    multinomial  sum of p (1 - p) / n
    varopt       sum over the sampled ids of p (r/m) - p^2, and what rounding to 1/GRID adds: for a
                 weight of w steps, f (1 - f) / GRID^2 with f the fraction of w

Shape letters: C positions, V vocabulary, K most probable ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megadistill.targets.streams.rounding import GRID

_TOP = 256  # heads a position has at most, at tau above 1/128


class Variances:
    """Computes variances of sampling from a distribution; goes through it once."""

    def __init__(self, distribution: Any) -> None:
        tops, squares, totals = [], [], []
        for log_probs_CV in distribution:
            probs_CV = log_probs_CV.double().exp()
            tops.append(probs_CV.topk(min(_TOP, probs_CV.shape[1]), 1).values)
            squares.append(probs_CV.square().sum(1))
            totals.append(probs_CV.sum(1))
        self._top_NK, self._square_N = torch.cat(tops), torch.cat(squares)
        self._total_N = torch.cat(totals)

    def multinomial(self, draws: int) -> float:
        """Returns the variance of `draws` draws with replacement."""
        return float(((1 - self._square_N) / draws).mean())

    def varopt(self, tau: float, *, rounded: bool = True) -> float:
        """Returns the variance of threshold sampling at tau."""
        top_NK = self._top_NK
        heads_N, points_N, rest_N = self._split(tau)
        squares_NK = torch.nn.functional.pad(top_NK.square().cumsum(1), (1, 0))
        square_N = self._square_N - squares_NK.gather(1, heads_N[:, None])[:, 0]
        variance_N = rest_N.square() / points_N - square_N
        if rounded:
            is_head_NK = torch.arange(top_NK.shape[1]) < heads_N[:, None]
            variance_N += (_rounding(top_NK) * is_head_NK).sum(1) + _rounding(rest_N) / points_N
        return float(variance_N.mean())

    def entries(self, tau: float) -> float:
        """A position's of threshold sampling at tau, before rounding drops any."""
        heads_N, points_N, rest_N = self._split(tau)
        return float((heads_N + points_N * (rest_N > 0)).mean())

    def _split(self, tau: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N] each: heads, points of the rest, and the rest's mass."""
        top_NK = self._top_NK
        sums_NK = torch.nn.functional.pad(top_NK.cumsum(1), (1, 0))
        heads_N = (top_NK >= tau).sum(1).clamp_min(1)
        while True:
            rest_N = (self._total_N - sums_NK.gather(1, heads_N[:, None])[:, 0]).clamp_min(0)
            points_N = (rest_N / tau).ceil().clamp_min(1)
            above_N = (top_NK * points_N[:, None] > rest_N[:, None]).sum(1)
            more_N = torch.maximum(heads_N, above_N)
            if torch.equal(more_N, heads_N):
                return heads_N, points_N, rest_N
            heads_N = more_N

    def tau(self, variance: float) -> float:
        """The tau at which varopt, rounded, has this variance."""
        return _largest(lambda tau: self.varopt(tau) < variance)

    def tau_of_entries(self, entries: float) -> float:
        """The smallest tau at which varopt has no more entries than that."""
        return _largest(lambda tau: self.entries(tau) > entries)


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest tau for which `holds`, which no larger one does."""
    low, high = 1.0 / 128, 0.5
    for _ in range(40):
        tau = (low + high) / 2
        low, high = (tau, high) if holds(tau) else (low, tau)
    return low


def _rounding(weights: torch.Tensor) -> torch.Tensor:
    fraction = (weights * GRID) % 1
    return fraction * (1 - fraction) / GRID**2
