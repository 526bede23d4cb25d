"""The sampled methods: few ids, and E[weight] = probability for every id of the vocabulary.

varopt is threshold sampling (Cohen, Duffield, Kaplan, Lund, Thorup: "Efficient stream sampling for
variance-optimal estimation of subset sums") with systematic draws (Madow 1949): an id of
probability p >= tau is a head and keeps p, the rest, of mass r, is drawn m = ceil(r / tau) times at
equal steps r / m. Heads have no variance, no id is drawn twice, and the drawn weights are equal.

multinomial draws n times with replacement (random sampling distillation, arXiv 2503.16870): an id
drawn c times weighs c / n. At equal entries its variance is 3 to 5 times that of varopt.

A position's weights sum to 1 in both.

Shape letters: N positions, K candidates, M points, E entries of a row.
"""

from __future__ import annotations

from typing import Any

import torch

from megadistill.storage.counter_rng import below
from megadistill.targets import SparseTargets
from megadistill.teacher.distributions import BLOCK, FIXED_POINT, Distributions, find, offsets_of


def varopt(
    distributions: Distributions, start_N: torch.Tensor, *, tau: float, **common: Any
) -> SparseTargets:
    """Threshold sampling. start_N: int64 in [0, 2^44). Overwrites the distributions."""
    vocabulary, threshold = distributions.vocabulary, max(1, round(tau * FIXED_POINT))
    # An id joins the heads above r/m, and r/m > tau/2 where there is more than one point to draw:
    # so there are at most 2/tau + 1 heads.
    ids_NK, _, fixed_NK = distributions.best(int(2 / tau) + 2)
    blocks_NBb, ends_NB = distributions.blocks()
    total_N = vocabulary.gather(ends_NB[:, -1]).sum(0)
    heads_N, rest_N, points_N = _heads(fixed_NK, total_N, threshold)

    # The heads leave the mass that is drawn from.
    head_NK = torch.arange(fixed_NK.shape[1], device=heads_N.device) < heads_N[:, None]
    local_NK = ids_NK - vocabulary.first
    mine_NK = head_NK & (local_NK >= 0) & (local_NK < vocabulary.size)
    row_E, column_E = mine_NK.nonzero()[:, 0], local_NK[mine_NK]
    blocks_NBb[row_E, column_E // BLOCK, column_E % BLOCK] = 0
    taken_NB = torch.zeros_like(ends_NB)
    taken_NB.index_put_((row_E, column_E // BLOCK), fixed_NK[mine_NK], accumulate=True)
    ends_NB -= taken_NB.cumsum_(1)

    j_M = torch.arange(int(points_N.max()) if len(points_N) else 0, device=heads_N.device)
    point_NM = below(rest_N, start_N)[:, None] + j_M * rest_N[:, None]
    point_NM = point_NM // points_N.clamp_min(1)[:, None]
    drawn_NM = find(point_NM, j_M < points_N[:, None], blocks_NBb, ends_NB, vocabulary)

    total_N1 = total_N.double()[:, None]
    weight_N1 = (rest_N.double() / points_N.clamp_min(1).double())[:, None] / total_N1
    ids_NE = torch.cat([ids_NK, drawn_NM], 1)
    weights_NE = torch.cat([fixed_NK.double() / total_N1, weight_N1.expand(drawn_NM.shape)], 1)
    keep_NE = torch.cat([head_NK, drawn_NM >= 0], 1)
    return SparseTargets(
        offsets=offsets_of(keep_NE.sum(1)),
        ids=ids_NE[keep_NE],
        weights=weights_NE[keep_NE].float(),
        tail=torch.zeros_like(total_N, dtype=torch.float32),
        heads=heads_N,
        **common,
    )


def _heads(
    fixed_NK: torch.Tensor, total_N: torch.Tensor, threshold: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(heads_N, rest_N, points_N), all int64 [N].

    How many ids keep their own probability, what mass is left, and how many points are drawn from
    it. fixed_NK is sorted, so the heads are its beginning.
    """
    before_NK = torch.nn.functional.pad(fixed_NK.cumsum(1), (1, 0))
    heads_N = (fixed_NK >= threshold).sum(1).clamp_min(1)
    while True:
        rest_N = total_N - before_NK.gather(1, heads_N[:, None])[:, 0]
        points_N = (rest_N + threshold - 1) // threshold
        above_N = (fixed_NK * points_N[:, None] > rest_N[:, None]).sum(1)
        more_N = torch.maximum(heads_N, above_N)
        if torch.equal(more_N, heads_N):
            return heads_N, rest_N, points_N
        heads_N = more_N


def multinomial(
    distributions: Distributions, uniforms_NM: torch.Tensor, **common: Any
) -> SparseTargets:
    """A draw with replacement for each of uniforms_NM, int64 in [0, 2^44)."""
    vocabulary, draws = distributions.vocabulary, uniforms_NM.shape[1]
    blocks_NBb, ends_NB = distributions.blocks()
    total_N = vocabulary.gather(ends_NB[:, -1]).sum(0)
    point_NM = below(total_N[:, None], uniforms_NM)
    every_NM = torch.ones_like(point_NM, dtype=torch.bool)
    drawn_NM = find(point_NM, every_NM, blocks_NBb, ends_NB, vocabulary).sort(1).values

    # Equal ids stand together: an entry is where a new one begins, its count how long it goes on.
    new_NM = torch.ones_like(every_NM)
    new_NM[:, 1:] = drawn_NM[:, 1:] != drawn_NM[:, :-1]
    begin_E = new_NM.flatten().nonzero()[:, 0]
    count_E = torch.diff(begin_E, append=begin_E.new_tensor([new_NM.numel()]))
    # Most drawn first, then the lower id: 32 bits of an id below the draws that an entry lacks.
    keys_NM = torch.full_like(drawn_NM, draws << 32)
    keys_NM[new_NM] = ((draws - count_E) << 32) | drawn_NM[new_NM]
    keys_NM = keys_NM.sort(1).values
    keys_E = keys_NM[keys_NM < draws << 32]
    return SparseTargets(
        offsets=offsets_of(new_NM.sum(1)),
        ids=keys_E & 0xFFFFFFFF,
        weights=((draws - (keys_E >> 32)).double() / draws).float(),
        tail=torch.zeros_like(total_N, dtype=torch.float32),
        **common,
    )
