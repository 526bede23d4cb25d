"""forward_kl, KL(p || q), and reverse_kl, KL(q || p): p the teacher, q the student."""

from __future__ import annotations

from typing import ClassVar

from megadistill.student.loss.divergences.divergence import (
    Buckets,
    Divergence,
    Parameters,
    Terms,
    kl_terms,
    where_positive,
)


class ForwardKL(Divergence):
    """Forward KL, the only one that is linear in the teacher's probabilities.

    So it alone stays unbiased over sampled targets. Infinite where q is 0 and p is not.
    """

    needs_floor: ClassVar[bool] = False

    def terms(self, buckets: Buckets, parameters: Parameters, *, has_tail: bool) -> Terms:
        return kl_terms(buckets.p, buckets.q, buckets.gap), buckets.q - buckets.p


class ReverseKL(Divergence):
    def terms(self, buckets: Buckets, parameters: Parameters, *, has_tail: bool) -> Terms:
        d = buckets.gap
        return kl_terms(buckets.q, buckets.p, -d), where_positive(buckets.q, d)


FORWARD_KL, REVERSE_KL = ForwardKL(), ReverseKL()
