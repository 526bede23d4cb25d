"""The listed methods: the most probable ids with their probabilities, and the mass left out.

topk keeps the k most probable ids, topp the smallest such set with mass >= p, at most k. Where the
ground truth is not among them it is added, and flagged: a student that is never told the truth's
probability does worse than its list suggests (arXiv 2503.16870: of the gap between cross-entropy
and full distillation, 55 % is closed with 100 ids, 97 % with the truth added).

Shape letters: N positions, K candidates.
"""

from __future__ import annotations

from typing import Any

import torch

from megadistill.targets import SparseTargets
from megadistill.teacher.distributions import FIXED_POINT, Distributions, offsets_of


def listed(
    distributions: Distributions,
    *,
    k: int,
    p: float | None,
    labels_N: torch.Tensor | None,
    truth_N: torch.Tensor | None,
    **common: Any,
) -> SparseTargets:
    """The k most probable ids, or with p the first of them that together have mass p.

    labels_N, truth_N: the true ids and their log-probabilities, or None: none is added.
    """
    gather = distributions.vocabulary.gather
    total_N = gather(distributions.fixed_NV.sum(1)).sum(0)
    ids_NK, log_probs_NK, fixed_NK = distributions.best(k)
    keep_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    if p is not None:
        needed_N = (total_N.double() * p).ceil().to(torch.int64)
        keep_NK = fixed_NK.cumsum(1) - fixed_NK < needed_N[:, None]
    listed_N = (fixed_NK * keep_NK).sum(1)
    added_N = torch.zeros_like(total_N, dtype=torch.bool)
    if labels_N is not None and truth_N is not None:
        added_N = ~(keep_NK & (ids_NK == labels_N[:, None])).any(1)
        truth_fixed_N = (truth_N.exp() * FIXED_POINT).to(torch.int64)
        listed_N = listed_N + torch.where(added_N, truth_fixed_N, 0)
        ids_NK = torch.cat([ids_NK, labels_N[:, None]], 1)
        log_probs_NK = torch.cat([log_probs_NK, truth_N[:, None]], 1)
        keep_NK = torch.cat([keep_NK, added_N[:, None]], 1)
    tail_N = ((total_N - listed_N).clamp_min(0).double() / total_N.double()).float()
    return SparseTargets(
        offsets=offsets_of(keep_NK.sum(1)),
        ids=ids_NK[keep_NK],
        weights=log_probs_NK.exp()[keep_NK],
        tail=tail_N,
        truth_added=added_N,
        **common,
    )
