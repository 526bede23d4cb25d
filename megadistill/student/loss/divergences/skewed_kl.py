"""skewed_kl and skewed_reverse_kl: KL of one side from a mixture of both, 0 < alpha < 1.

skewed_kl          KL(p || alpha p + (1 - alpha) q)
skewed_reverse_kl  KL(q || alpha q + (1 - alpha) p)

The skew bounds the gradient where the other side has no mass (DistiLLM, arXiv 2402.03898).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from megadistill.student.loss.divergences.divergence import (
    Buckets,
    Divergence,
    Parameters,
    Terms,
    kl_terms,
    log_mixture_ratio,
    where_positive,
)


class SkewedKL(Divergence):
    parameters: ClassVar[Parameters] = {"alpha": 0.1}

    def terms(self, buckets: Buckets, parameters: Parameters, *, has_tail: bool) -> Terms:
        alpha = parameters["alpha"]
        p, q = buckets.p, buckets.q
        log_m_p = log_mixture_ratio(buckets.gap, alpha)
        value = kl_terms(p, alpha * p + (1 - alpha) * q, log_m_p)
        return value, (alpha - 1) * where_positive(q, torch.expm1(-log_m_p))


class SkewedReverseKL(Divergence):
    parameters: ClassVar[Parameters] = {"alpha": 0.1}

    def terms(self, buckets: Buckets, parameters: Parameters, *, has_tail: bool) -> Terms:
        alpha = parameters["alpha"]
        p, q = buckets.p, buckets.q
        log_m_q = log_mixture_ratio(-buckets.gap, alpha)
        value = kl_terms(q, alpha * q + (1 - alpha) * p, log_m_q)
        return value, -where_positive(q, log_m_q + alpha * torch.expm1(-log_m_q))


SKEWED_KL, SKEWED_REVERSE_KL = SkewedKL(), SkewedReverseKL()
