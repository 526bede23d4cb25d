"""Sparse targets with the mass that they leave out put on the true token.

Shapes: N positions, E entries.
"""

from __future__ import annotations

import dataclasses

import torch

from megadistill.targets import SparseTargets


def assign_tail_to_label(targets: SparseTargets, labels_N: torch.Tensor) -> SparseTargets:
    """The mass that each row leaves out, given to its true token: the ground-truth residual.

    labels_N: int64, the true next tokens of all rows. What stays unlisted then has no mass. A row
    without targets stays without (arXiv 2503.16870, its ghost token put on the ground truth).
    """
    counts = targets.counts
    row_E = torch.repeat_interleave(
        torch.arange(len(counts), device=counts.device), counts, output_size=len(targets.ids)
    )
    is_truth_E = targets.ids == labels_N[row_E]
    is_missing_N = counts > 0
    is_missing_N[row_E[is_truth_E]] = False
    widened = counts + is_missing_N
    offsets = torch.cat([counts.new_zeros(1), widened.cumsum(0)])
    place_E = torch.arange(len(row_E), device=counts.device)
    place_E += offsets[row_E] - targets.offsets[row_E]
    place_of_truth = offsets[1:][is_missing_N] - 1

    ids = targets.ids.new_empty(int(offsets[-1]))
    ids[place_E], ids[place_of_truth] = targets.ids, labels_N[is_missing_N]
    weights = targets.weights.new_empty(len(ids))
    weights[place_E] = torch.where(
        is_truth_E, targets.weights + targets.tail[row_E], targets.weights
    )
    weights[place_of_truth] = targets.tail[is_missing_N]
    return dataclasses.replace(
        targets,
        offsets=offsets,
        ids=ids,
        weights=weights,
        tail=torch.zeros_like(targets.tail),
        truth_added=None,
    )
