"""The softmax of a chunk's logits in place, in two halves, with one look at its norm in between.

    norm = begin(z_CV)                 # maximum and sum of each row
    finish(z_CV, norm, multiplier_C)   # z becomes multiplier * softmax

What z holds between the two is the implementation's own. torch normalises in the first half and
multiplies in the second. On a GPU, where going through memory is all the cost, Triton kernels
(triton_kernels.py) read z once in the first half, and read and write it once in the second: three
passes in place of eight. They are used where triton is there and agrees with torch on a small case.

Shapes: C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)


class Norm(NamedTuple):
    """A softmax's normaliser by row: the maximum, and the sum of exponentials relative to it."""

    top_C: torch.Tensor
    total_C: torch.Tensor

    @property
    def logsumexp_C(self) -> torch.Tensor:
        return self.top_C + self.total_C.log()

    def log_prob(self, z_C: torch.Tensor) -> torch.Tensor:
        # In this order: at logits of 400, float32 rounds a log-sum-exp by 3e-5.
        return (z_C - self.top_C) - self.total_C.log()


def softmax_stats(z_CV: torch.Tensor) -> Norm:
    """The norm of each row's softmax; of a row of nothing but -inf: -inf and 0. Overwrites z."""
    if _by_kernels(z_CV):
        from megadistill.student.loss import triton_kernels

        return Norm(*triton_kernels.norms(z_CV))
    return _softmax(z_CV)


def softmax_scale(z_CV: torch.Tensor, norm: Norm, multiplier_C: torch.Tensor) -> None:
    """Make z, as `softmax_stats` left it, multiplier * softmax; 0 in a row of nothing but -inf."""
    if _by_kernels(z_CV):
        from megadistill.student.loss import triton_kernels

        triton_kernels.exponentials(z_CV, norm.top_C, norm.total_C, multiplier_C)
    else:
        z_CV.mul_(multiplier_C[:, None])


def _softmax(z_CV: torch.Tensor) -> Norm:
    top_C = z_CV.amax(1)
    if z_CV.is_contiguous() and not z_CV.is_cuda:
        # One operator of torch's own: a chunk of 256 x 131,072 takes 0.06 s on two cores, the
        # four of below 0.12 s. Going row by row, to stay in the cache, took longer: more barriers.
        torch.softmax(z_CV, 1, out=z_CV)
        # exp(0) stands at the maximum.
        total_C = z_CV.amax(1).reciprocal_()
        empty_C = top_C == -torch.inf
        if empty_C.any():
            z_CV[empty_C], total_C = 0.0, total_C.masked_fill(empty_C, 0.0)
        return Norm(top_C, total_C)
    total_C = z_CV.sub_(top_C.clamp_min(torch.finfo(z_CV.dtype).min)[:, None]).exp_().sum(1)
    z_CV.mul_(torch.where(total_C > 0, 1 / total_C, 0.0)[:, None])
    return Norm(top_C, total_C)


def _by_kernels(z_CV: torch.Tensor) -> bool:
    return z_CV.is_cuda and z_CV.dtype == torch.float32 and kernels_agree(z_CV.device)


@functools.cache
def kernels_agree(device: torch.device) -> bool:
    """Whether triton is there and its kernels do on `device` what torch does. Tried once."""
    try:
        from megadistill.student.loss import triton_kernels
    except ImportError:
        return False
    try:
        z_CV = torch.randn(5, 3001, generator=torch.Generator().manual_seed(0)).mul_(5)
        z_CV[1, ::7] = -torch.inf
        z_CV[2] = -torch.inf
        ours_CV, theirs_CV = z_CV.to(device), z_CV.clone()
        multiplier_C = torch.arange(5.0)
        theirs = _softmax(theirs_CV)
        theirs_CV.mul_(multiplier_C[:, None])
        found = triton_kernels.norms(ours_CV)
        triton_kernels.exponentials(ours_CV, *found, multiplier_C.to(device))
        for a, b in zip((*found, ours_CV), (*theirs, theirs_CV), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)
    except Exception as error:  # noqa: BLE001 - a compiler's, a driver's: anything; torch serves
        log.warning(
            "the Triton kernels of the head are not used on %s (%s: %s): torch's operators are, at "
            "some cost in time",
            device,
            type(error).__name__,
            str(error).strip().split("\n")[0],
        )
        return False
    return True
