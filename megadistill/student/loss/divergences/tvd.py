"""tvd: the total variation distance, sum |p - q| / 2."""

from __future__ import annotations

from typing import ClassVar

from megadistill.student.loss.divergences.divergence import Buckets, Divergence, Parameters, Terms


class TotalVariation(Divergence):
    needs_floor: ClassVar[bool] = False  # no logarithm is taken

    def terms(self, buckets: Buckets, parameters: Parameters, *, has_tail: bool) -> Terms:
        p, q = buckets.p, buckets.q
        return (q - p).abs() / 2, q * (q - p).sign() / 2


TVD = TotalVariation()
