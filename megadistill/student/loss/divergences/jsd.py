"""jsd: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1.

Generalised Jensen-Shannon divergence of on-policy distillation (GKD, arXiv 2306.13649).
"""

from __future__ import annotations

from typing import ClassVar

from megadistill.student.loss.divergences.divergence import (
    Buckets,
    Divergence,
    Parameters,
    Terms,
    kl_terms,
    log_mixture_ratio,
    where_positive,
)


class JensenShannon(Divergence):
    parameters: ClassVar[Parameters] = {"beta": 0.5}

    def terms(self, buckets: Buckets, parameters: Parameters, *, has_tail: bool) -> Terms:
        beta = parameters["beta"]
        p, q, d = buckets.p, buckets.q, buckets.gap
        m, log_m_p = beta * p + (1 - beta) * q, log_mixture_ratio(d, beta)
        log_m_q = log_mixture_ratio(-d, 1 - beta)
        value = beta * kl_terms(p, m, log_m_p) + (1 - beta) * kl_terms(q, m, log_m_q)
        return value, (beta - 1) * where_positive(q, log_m_q)


JSD = JensenShannon()
