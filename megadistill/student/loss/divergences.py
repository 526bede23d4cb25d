"""Divergences between two distributions over a few buckets, and their slopes.

A position's buckets are the listed ids and the tail as one more. p is the teacher, q the student.

forward_kl         KL(p || q)
reverse_kl         KL(q || p)
jsd                beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1
                   (generalised Jensen-Shannon, arXiv 2306.13649)
skewed_kl          KL(p || alpha p + (1 - alpha) q), 0 < alpha < 1 (DistiLLM, arXiv 2402.03898)
skewed_reverse_kl  KL(q || alpha q + (1 - alpha) p)
tvd                sum |p - q| / 2
adaptive_kl        g / (g + h) KL(p || q) + h / (g + h) KL(q || p), where g sums |p - q| over the
                   head and h over the rest; the head is the fewest most probable buckets of the
                   teacher with mass >= head_mass, never the tail. The weights are constants to the
                   gradient (AKL, arXiv 2404.02657)

Every KL(a || b) is summed by bucket as a (expm1(d) - d), d = log b - log a. That adds sum(b) -
sum(a), which is 0, and makes every term non-negative, so that rounding cannot make a divergence
negative and nothing is clamped. The logarithm of a mixture is taken relative to one of its two
parts, exact where they nearly agree and where they are far apart.

A teacher's probability of 0 is one that float32 could not hold. Where q is divided by it, it counts
as the least normal float32, e^-87.3: reverse_kl and adaptive_kl stay finite.

Shapes: C positions, B buckets. Where p and q are both 0 (what fills up short rows) value and slope
are 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

TINY = torch.finfo(torch.float32).tiny
LOG_TINY = math.log(TINY)

Terms = tuple[torch.Tensor, torch.Tensor]  # [C, B] each: the value by bucket, its slope


class Divergence(NamedTuple):
    """Which one, and its parameters; each is read by those that name it above."""

    name: str = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    head_mass: float = 0.5


@dataclass(frozen=True)
class Buckets:
    """Two distributions [C, B] over the same buckets, the tail in the last column."""

    p: torch.Tensor
    q: torch.Tensor
    log_p: torch.Tensor
    log_q: torch.Tensor

    @classmethod
    def of(cls, p_CB: torch.Tensor, log_q_CB: torch.Tensor) -> Buckets:
        return cls(p_CB, log_q_CB.exp(), p_CB.log(), log_q_CB)

    def softened(self, power: float) -> Buckets:
        """Both raised to a power and normalised anew: 1 / T of a temperature."""
        log_p, log_q = (torch.log_softmax(power * log, 1) for log in (self.log_p, self.log_q))
        return Buckets(log_p.exp(), log_q.exp(), log_p, log_q)

    def floored(self) -> Buckets:
        """With the least normal float32 as p where p is less and q is not 0."""
        held = (self.log_p >= LOG_TINY) | (self.q == 0)
        p, log_p = torch.where(held, self.p, TINY), torch.where(held, self.log_p, LOG_TINY)
        return Buckets(p, self.q, log_p, self.log_q)

    @property
    def gap(self) -> torch.Tensor:
        """log q - log p; nan where both are 0."""
        return self.log_q - self.log_p


def divergence_terms(kind: Divergence, buckets: Buckets, *, has_tail: bool = True) -> Terms:
    """The value of each bucket, to be summed over a row, and its slope q * d(value) / dq.

    The slope is the derivative by log q with the other buckets held, so the gradient by the logit
    behind a bucket is slope - q * sum(slope). has_tail: whether the last column is the tail.
    """
    if kind.name not in ("forward_kl", "adaptive_kl", "tvd"):
        buckets = buckets.floored()
    p, q = buckets.p, buckets.q
    match kind.name:
        case "forward_kl":
            value, slope = _forward(buckets)
        case "reverse_kl":
            value, slope = _reverse(buckets)
        case "jsd":
            beta, d = kind.beta, buckets.gap
            m, log_m_p = beta * p + (1 - beta) * q, log_mixture_ratio(d, beta)
            log_m_q = log_mixture_ratio(-d, 1 - beta)
            value = beta * kl_terms(p, m, log_m_p) + (1 - beta) * kl_terms(q, m, log_m_q)
            slope = (beta - 1) * _times(q, log_m_q)
        case "skewed_kl":
            log_m_p = log_mixture_ratio(buckets.gap, kind.alpha)
            value = kl_terms(p, kind.alpha * p + (1 - kind.alpha) * q, log_m_p)
            slope = (kind.alpha - 1) * _times(q, torch.expm1(-log_m_p))
        case "skewed_reverse_kl":
            log_m_q = log_mixture_ratio(-buckets.gap, kind.alpha)
            value = kl_terms(q, kind.alpha * q + (1 - kind.alpha) * p, log_m_q)
            slope = -_times(q, log_m_q + kind.alpha * torch.expm1(-log_m_q))
        case "tvd":
            value, slope = (q - p).abs() / 2, q * (q - p).sign() / 2
        case "adaptive_kl":
            head_C1 = head_weight(buckets, kind.head_mass, has_tail=has_tail)
            ahead, ahead_slope = _forward(buckets)
            back, back_slope = _reverse(buckets.floored())
            value = head_C1 * ahead + (1 - head_C1) * back
            slope = head_C1 * ahead_slope + (1 - head_C1) * back_slope
        case _:
            raise ValueError(f"divergence is {kind.name!r}, which is not known")
    return value, slope


def head_weight(buckets: Buckets, head_mass: float, *, has_tail: bool = True) -> torch.Tensor:
    """[C, 1] in 0 to 1: the share of adaptive KL's forward part; 1/2 where p equals q."""
    error, ids = (buckets.p - buckets.q).abs(), slice(-1 if has_tail else None)
    listed = buckets.p[:, ids].sort(dim=1, descending=True, stable=True)
    before = listed.values.cumsum(1) - listed.values
    is_head = (before < head_mass) & (listed.values > 0)
    gap_C1 = (error[:, ids].gather(1, listed.indices) * is_head).sum(1, keepdim=True)
    total_C1 = error.sum(1, keepdim=True)
    return torch.where(total_C1 > 0, gap_C1 / total_C1, 0.5).clamp_max(1.0)


def log_mixture_ratio(d: torch.Tensor, share: float) -> torch.Tensor:
    """log(share + (1 - share) e^d), exact near d = 0 and at any size of d."""
    above = d + torch.log1p(share * torch.expm1(-d))
    return torch.where(d > 0, above, torch.log1p((1 - share) * torch.expm1(d)))


def kl_terms(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """a * (exp(d) - 1 - d) with d = log b - log a: never negative; b where a is 0.

    Summed over the buckets of two distributions it is KL(a || b).
    """
    series = d * d * (1 / 2 + d / 6 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7)))))
    # Far above, a may be subnormal and exp(d) infinite, while b itself is harmless.
    terms = torch.where(d.abs() < 0.25, a * series, a * (torch.expm1(d) - d))
    terms = torch.where(d > 1, b - a - a * d, terms)
    return torch.where(a > 0, terms, b)


def _forward(buckets: Buckets) -> Terms:
    p, q = buckets.p, buckets.q
    return kl_terms(p, q, buckets.gap), q - p


def _reverse(buckets: Buckets) -> Terms:
    d = buckets.gap
    return kl_terms(buckets.q, buckets.p, -d), _times(buckets.q, d)


def _times(q: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """q * factor; 0 where q is 0, whose logarithm is not finite."""
    return torch.where(q > 0, q * factor, 0.0)
