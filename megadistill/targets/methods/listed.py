"""Base of the listed methods: the most probable ids, their probabilities, the mass left out.

Where the ground truth is not among them it is added, and flagged: a student that is never told the
truth's probability does worse than its list suggests (arXiv 2503.16870: of the gap between
cross-entropy and full distillation, 55 % is closed with 100 ids, 97 % with the truth added).

The streams on disk are those of streams/listed.py. Retruncating keeps the beginning of a list and
adds to the tail what it drops.

Shape letters: N positions, K candidates, E entries.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from megadistill.targets.method import Fields, SparseMethod, Values
from megadistill.targets.sparse import SparseTargets
from megadistill.targets.streams.listed import put_listed, take_listed
from megadistill.targets.streams.symbols import SymbolReader, SymbolWriter

if TYPE_CHECKING:
    from megadistill.targets.distributions import Positions


class Listed(SparseMethod):
    """At most k ids, or with a parameter p the first of them that together have mass p."""

    adds_truth = True

    def largest_entries(self, values: Values) -> int:
        return int(values["k"]) + 1

    def select(
        self, positions: Positions, values: Values, *, seed: int, **common: Any
    ) -> SparseTargets:
        return _select(positions, k=values["k"], p=values.get("p"), method=self.name, **common)

    def put(self, writer: SymbolWriter, t: SparseTargets, ranks_E: np.ndarray) -> int:
        return put_listed(writer, t, ranks_E)

    def take(self, reader: SymbolReader, n: int, parameter: int, truth: bool, file: str) -> Fields:
        return take_listed(reader, n, truth, file)

    def retruncate(
        self,
        t: SparseTargets,
        values: Values,
        *,
        keys_N: np.ndarray,
        labels_N: np.ndarray | None,
        seed: int,
        times: int,
    ) -> SparseTargets:
        return _cut(t, k=values.get("k"), p=values.get("p"), labels_N=labels_N)


def _select(positions: Positions, *, k: int, p: float | None, **common: Any) -> SparseTargets:
    """The k most probable ids, or with p the first of them that together have mass p.

    Without labels no true id is added.
    """
    import torch

    from megadistill.targets.distributions import FIXED_POINT, offsets_of

    labels_N, truth_N = positions.labels_N, positions.truth_N
    gather = positions.distributions.vocabulary.gather
    total_N = gather(positions.distributions.fixed_NV.sum(1)).sum(0)
    ids_NK, log_probs_NK, fixed_NK = positions.distributions.best(k)
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


def _cut(
    t: SparseTargets, *, k: int | None, p: float | None, labels_N: np.ndarray | None
) -> SparseTargets:
    counts = t.counts
    added_N = np.zeros(len(t), bool) if t.truth_added is None else t.truth_added.astype(bool)
    row_E = np.repeat(np.arange(len(t)), counts)
    added_E = np.zeros(len(t.ids), bool)
    added_E[t.offsets[1:][added_N] - 1] = True
    order = np.lexsort((t.ids, -t.weights, added_E, row_E))
    ids, weights, added_E = t.ids[order], t.weights[order], added_E[order]

    rank_E = np.arange(len(ids)) - t.offsets[row_E]
    keep_E = added_E | (rank_E < (math.inf if k is None else k))
    if p is not None:
        # Sums of integers, so that a position's cut does not depend on its neighbours.
        fixed_E = np.rint(weights.astype(np.float64) * 2.0**40).astype(np.int64)
        before_E = np.cumsum(fixed_E) - fixed_E
        keep_E &= added_E | (before_E - before_E[t.offsets[row_E]] < p * 2.0**40)
    if labels_N is not None:
        truth_E = (ids == labels_N[row_E]) & ~keep_E
        keep_E |= truth_E
        added_N = added_N | (np.bincount(row_E[truth_E], minlength=len(t)) > 0)
    dropped_N = np.bincount(row_E[~keep_E], weights[~keep_E], minlength=len(t))
    counts = np.bincount(row_E[keep_E], minlength=len(t))
    return dataclasses.replace(
        t,
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        ids=ids[keep_E],
        weights=weights[keep_E],
        tail=(t.tail + dropped_N).astype(np.float32),
        truth_added=added_N,
    )
