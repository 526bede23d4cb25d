"""Distributions over a slice of the vocabulary, and the two questions that selecting asks of them.

Which ids are the most probable, and on which ids do given points of the prefix sum fall. Of a
tensor-parallel group only each rank's best candidates (K ids), its mass and the ids it found
travel, never a row of V.

Everything that decides is an integer. Probabilities are fixed point, 2^-40, so that sums are exact
in any order and every slicing of the vocabulary gives the same answer; float32 prefix sums picked
other ids in 4 of 2,560 positions at tp = 4. Of equal values the lower id comes first.

Neither question sorts a row, nor stores its prefix sum: both look at blocks of 64 ids first. The
best candidates take 0.6 of the time of torch.topk, which leaves open which of equal values it
takes.

Shape letters: N positions, V vocabulary (here: this rank's slice), B blocks, b ids of a block, K
candidates, M points, E found points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

FIXED_POINT = 1 << 40
BLOCK = 64  # ids of a block


@dataclass(frozen=True)
class VocabularySlice:
    """Which ids [first, first + size) this rank holds, and whom to ask for the others."""

    first: int
    size: int
    group: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[ranks, *shape]: everybody's tensor, in rank order."""
        if self.ranks == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.ranks)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)


@dataclass(frozen=True)
class Distributions:
    """N distributions, this rank's slice of them.

    values_NV  float32, larger for a more probable id: what the order of candidates goes by
    fixed_NV   int64, the probabilities in units of 2^-40
    """

    values_NV: torch.Tensor
    fixed_NV: torch.Tensor
    vocabulary: VocabularySlice

    def rows(self, keep_N: torch.Tensor) -> Distributions:
        """The positions where keep_N."""
        return Distributions(self.values_NV[keep_N], self.fixed_NV[keep_N], self.vocabulary)

    def best(self, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The k most probable ids of the whole vocabulary: ids_NK, values_NK, fixed_NK, sorted."""
        vocabulary = self.vocabulary
        columns_NK = columns_near_the_top(self.values_NV, k, order=_ordered)
        if columns_NK is None:
            columns_NK = torch.arange(self.values_NV.shape[1], device=self.values_NV.device)
            columns_NK = columns_NK.expand(self.values_NV.shape)
        keys_NK = _ordered(self.values_NV.gather(1, columns_NK), columns_NK + vocabulary.first)
        keys_NK = keys_NK.topk(min(k, keys_NK.shape[1]), dim=1).values
        fixed_NK = self.fixed_NV.gather(1, _id_of(keys_NK) - vocabulary.first)
        if vocabulary.ranks > 1:
            # A slice may hold fewer than k: pad, below every real candidate.
            pad, lowest = (0, k - keys_NK.shape[1]), torch.iinfo(torch.int64).min
            keys_NK = torch.nn.functional.pad(keys_NK, pad, value=lowest)
            fixed_NK = torch.nn.functional.pad(fixed_NK, pad)
            keys_NK = torch.cat(list(vocabulary.gather(keys_NK)), 1)
            fixed_NK = torch.cat(list(vocabulary.gather(fixed_NK)), 1)
            best = keys_NK.topk(k, dim=1)
            keys_NK, fixed_NK = best.values, fixed_NK.gather(1, best.indices)
            real_K = (keys_NK > lowest).all(0)
            keys_NK, fixed_NK = keys_NK[:, real_K], fixed_NK[:, real_K]
        return _id_of(keys_NK), _value_of(keys_NK), fixed_NK

    def blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(blocks_NBb, ends_NB): fixed_NV in blocks, a view where it can be; their prefix sums."""
        N, V = self.fixed_NV.shape
        pad = -V % BLOCK
        padded = torch.nn.functional.pad(self.fixed_NV, (0, pad)) if pad else self.fixed_NV
        blocks_NBb = padded.view(N, (V + pad) // BLOCK, BLOCK)
        return blocks_NBb, blocks_NBb.sum(2).cumsum_(1)


@dataclass(frozen=True)
class Positions:
    """The positions to select from. labels_N, truth_N (the label's log-probability) or None."""

    distributions: Distributions
    keys_N: torch.Tensor
    labels_N: Any
    truth_N: Any
    entropy_N: Any

    def rows(self, keep_N: torch.Tensor) -> Positions:
        return Positions(
            self.distributions.rows(keep_N),
            self.keys_N[keep_N],
            *(
                None if x is None else x[keep_N]
                for x in (self.labels_N, self.truth_N, self.entropy_N)
            ),
        )


def find(
    point_NM: torch.Tensor,
    wanted_NM: torch.Tensor,
    blocks_NBb: torch.Tensor,
    ends_NB: torch.Tensor,
    vocabulary: VocabularySlice,
) -> torch.Tensor:
    """int64 [N, M]: the ids that the points fall on, counted through all slices; -1: not wanted.

    A point falls on the first id whose prefix sum, itself included, exceeds it.
    """
    mass_N = ends_NB[:, -1]
    before_N = vocabulary.gather(mass_N)[: vocabulary.rank].sum(0)
    point_NM = point_NM - before_N[:, None]
    mine_NM = wanted_NM & (point_NM >= 0) & (point_NM < mass_N[:, None])
    block_E = torch.searchsorted(ends_NB, point_NM, right=True)[mine_NM]
    row_E = mine_NM.nonzero()[:, 0]
    before_E = torch.where(block_E > 0, ends_NB[row_E, block_E - 1], 0)
    rest_E = point_NM[mine_NM] - before_E
    # So many points at once that their blocks take no more memory than the chunk itself.
    at_once = max(1, blocks_NBb.numel() // BLOCK)
    parts = zip(*(t.split(at_once) for t in (row_E, block_E, rest_E)), strict=True)
    inside = [(blocks_NBb[r, b].cumsum(1) <= rest[:, None]).sum(1) for r, b, rest in parts]
    found_NM = torch.full_like(point_NM, -1)
    found_NM[mine_NM] = vocabulary.first + block_E * BLOCK + torch.cat(inside)
    return vocabulary.gather(found_NM).amax(0)


def offsets_of(counts_N: torch.Tensor) -> torch.Tensor:
    """int64 [N + 1]: where rows of these lengths begin and end."""
    return torch.nn.functional.pad(counts_N.cumsum(0), (1, 0))


def columns_near_the_top(
    values_NV: torch.Tensor,
    k: int,
    *,
    order: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """int64 [N, at least k] columns, in no order, that hold each row's k first.

    None stands for all columns: where k blocks are half of the row and more. The k first ids lie in
    the k first blocks, blocks ordered by their own first ids: one pass through the row in place of
    torch.topk's several. order: keys of values and their columns; default: the values, where of
    equal ones any may come first.
    """
    V = values_NV.shape[1]
    if 2 * k * BLOCK > V:
        return None
    columns_V = torch.arange(V, device=values_NV.device)
    whole = V - V % BLOCK
    keys_NB = values_NV[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)
    if order is not None:
        keys_NB = order(keys_NB, columns_V[: whole // BLOCK])
    blocks_NK = keys_NB.topk(k, dim=1, sorted=False).indices
    inside_NM = (blocks_NK[:, :, None] * BLOCK + columns_V[:BLOCK]).flatten(1)
    return torch.cat([inside_NM, columns_V[whole:].expand(len(values_NV), -1)], 1)


def _ordered(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64, larger for a larger value, then for a lower id (below 2^32).

    The bits of a float, made to order like an integer, stand above the id's complement.
    """
    bits = values.view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    return (order << 32) | (0xFFFFFFFF - ids)


def _id_of(keys: torch.Tensor) -> torch.Tensor:
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _value_of(keys: torch.Tensor) -> torch.Tensor:
    order = (keys >> 32).to(torch.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)
