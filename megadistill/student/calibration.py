"""Calibration: whether a student that gives its first choice 0.8 is right 8 times in 10.

Expected calibration error, after Guo et al. 2017 (On Calibration of Modern Neural Networks):
positions are dealt into 15 bins of equal width by the student's top-1 probability, and the error is
the mean over positions of |share of right choices - mean probability| of their bin. A bin is three
sums, so the bins of chunks, batches and ranks add up to those of the whole; errors would not.

Shapes: C positions of a chunk, M bins.
"""

from __future__ import annotations

import torch

BINS = 15


def calibration_bins(prob_C: torch.Tensor, right_C: torch.Tensor) -> torch.Tensor:
    """float64 [M, 3]: positions, their probabilities and their right choices, summed by bin.

    prob_C: probabilities of what was chosen; bin m holds those in (m / 15, (m + 1) / 15].
    right_C: bool.
    """
    prob_C = prob_C.double()
    bin_C = (prob_C * BINS).ceil().sub(1).clamp(0, BINS - 1)
    bins = torch.arange(BINS, device=prob_C.device, dtype=torch.float64)
    # A product rather than index_add_, whose order of summation on a GPU is not fixed. A
    # probability that is not a number spoils every bin, as it should.
    in_bin_MC = (bins[:, None] == bin_C).double()
    return in_bin_MC @ torch.stack([torch.ones_like(prob_C), prob_C, right_C.double()], 1)


def calibration_error(bins_M3: torch.Tensor) -> float:
    """The expected calibration error, 0 to 1; 0 where there is no position."""
    count_M, prob_M, right_M = bins_M3.unbind(1)
    return float((right_M - prob_M).abs().sum() / count_M.sum().clamp_min(1))
