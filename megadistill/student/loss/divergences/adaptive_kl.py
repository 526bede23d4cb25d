"""adaptive_kl: g / (g + h) KL(p || q) + h / (g + h) KL(q || p) (AKL, arXiv 2404.02657).

g sums |p - q| over the head and h over the rest; the head is the fewest most probable buckets of
the teacher with mass >= head_mass, never the tail. The weights are constants to the gradient.

Shapes: C positions, B buckets.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from megadistill.student.loss.divergences.divergence import Buckets, Divergence, Parameters, Terms
from megadistill.student.loss.divergences.kl import FORWARD_KL, REVERSE_KL


class AdaptiveKL(Divergence):
    parameters: ClassVar[Parameters] = {"head_mass": 0.5}
    needs_floor: ClassVar[bool] = False  # the reverse half alone needs it
    whole_rows: ClassVar[bool] = True  # the head is found by sorting a row

    def terms(self, buckets: Buckets, parameters: Parameters, *, has_tail: bool) -> Terms:
        head_mass = parameters["head_mass"]
        head_C1 = head_weight(buckets, head_mass, has_tail=has_tail)
        ahead, ahead_slope = FORWARD_KL.terms(buckets, parameters, has_tail=has_tail)
        back, back_slope = REVERSE_KL.terms(buckets.floored(), parameters, has_tail=has_tail)
        value = head_C1 * ahead + (1 - head_C1) * back
        return value, head_C1 * ahead_slope + (1 - head_C1) * back_slope


def head_weight(buckets: Buckets, head_mass: float, *, has_tail: bool = True) -> torch.Tensor:
    """[C, 1] in 0 to 1: the share of adaptive KL's forward part; 1/2 where p equals q."""
    error, ids = (buckets.p - buckets.q).abs(), slice(-1 if has_tail else None)
    listed = buckets.p[:, ids].sort(dim=1, descending=True, stable=True)
    before = listed.values.cumsum(1) - listed.values
    is_head = (before < head_mass) & (listed.values > 0)
    gap_C1 = (error[:, ids].gather(1, listed.indices) * is_head).sum(1, keepdim=True)
    total_C1 = error.sum(1, keepdim=True)
    return torch.where(total_C1 > 0, gap_C1 / total_C1, 0.5).clamp_max(1.0)


ADAPTIVE_KL = AdaptiveKL()
