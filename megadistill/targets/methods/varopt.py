"""varopt: heads with their own probability, the rest sampled without bias. The default method.

Threshold sampling (Cohen, Duffield, Kaplan, Lund, Thorup: "Efficient stream sampling for
variance-optimal estimation of subset sums") with systematic draws (Madow 1949): an id of
probability p >= tau is a head and keeps p, the rest, of mass r, is drawn m = ceil(r / tau) times at
equal steps r / m. Heads have no variance, no id is drawn twice, and the drawn weights are equal.
E[weight] = probability for every id of the vocabulary, and a position's weights sum to 1.

On disk weights are rounded to GRID-ths of the whole, at random and without bias (rounding.py),
which also drops what rounds to nothing. Rounding to equal steps is what a sum of variances asks
for: at 1/128 it adds 0.25 % to the variance of 50 draws and costs 11 bits a position, at 1/256
0.06 % and 13 bits; steps in the logarithm cost more at either. The heaviest head is what the others
leave of the whole, and is not stored. Streams:

    heads [N] | sampled entries [N]
    the other heads' weights, in 1/GRID
    rest       for each position with sampled entries: their mass r, as m * ratio - r with m their
               number; ratio, in the header, is the largest r/m of the sequence (see `_rest`)
    ranks of the heaviest heads | gaps between the other heads' ranks | between the sampled ones'

Within a position the order of entries carries nothing, so each group is sorted by rank and gaps are
stored: 6.5 bits a position less on the demo's teacher, of 75.

Retruncating takes threshold sampling of the old weights, which sum to 1, at a larger tau.

Shape letters: N positions, K candidates, M points, E entries.
"""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from megadistill.errors import CorruptBlockError
from megadistill.storage.counter_rng import (
    ROUND,
    SELECT,
    TRUNCATE,
    TRUNCATE_ROUND,
    below,
    uniform,
    uniforms,
)
from megadistill.targets.method import Fields, SparseMethod, Values
from megadistill.targets.sparse import SparseTargets, spread
from megadistill.targets.streams.ragged_rows import (
    arange,
    by_rank,
    gaps,
    offsets,
    places,
    ratio,
    repeat,
    rising,
    zeros,
)
from megadistill.targets.streams.rounding import GRID, round_to_grid
from megadistill.targets.streams.symbols import LEVELS, RANKS, SymbolReader, SymbolWriter

if TYPE_CHECKING:
    import torch

    from megadistill.targets.distributions import Distributions, Positions


class Varopt(SparseMethod):
    """Heads with weights of their own, and sampled entries that share one."""

    name, byte = "varopt", 0
    parameters = ("tau",)
    sampled = True
    has_heads = True
    bytes_an_entry, bytes_per_position = 1.8, 2.2
    retruncated_by = ("tau",)
    grows_to = MappingProxyType({"tau": 1.0})

    def expected_entries(self, values: Values) -> float:
        """Returns 2 / sqrt(tau): a teacher of 2 nats mean entropy.

        Measured, as multiples of 1 / sqrt(tau) at tau = 0.06 (with tau between 0.02 and 0.2 they
        move by a sixth up to 2 nats, by half at 4.4):

            entropy, nats   1.2   1.5*  1.6   2.1   3.2   4.4   4.8*
            entries         1.3   1.5   1.6   1.9   2.6   3.2   3.4

        (the demo's teacher at temperatures 0.4 to 1, 2,048 held-out positions; * synthetic
        (-log(rank + 2.7) + 3 normal) / T at 32,000 ids, T in 0.25..0.75, and T = 1). So a sure
        teacher has two thirds of the estimate, an unsure one up to 1.7 times it.
        """
        return 2 / math.sqrt(values["tau"])

    def largest_entries(self, values: Values) -> int:
        return math.ceil(1 / values["tau"]) + 1

    def select(
        self, positions: Positions, values: Values, *, seed: int, **common: Any
    ) -> SparseTargets:
        return threshold_sample(
            positions.distributions,
            uniform(positions.keys_N, seed=seed, purpose=SELECT),
            tau=values["tau"],
            rounding=uniform(positions.keys_N, seed=seed, purpose=ROUND) >> 12,
            **common,
        )

    def put(self, writer: SymbolWriter, t: SparseTargets, ranks_E: np.ndarray) -> int:
        """Append the streams; returns the ratio."""
        assert t.heads is not None
        parts_E, rest_N = round_to_grid(t)
        row_E = np.repeat(np.arange(len(t)), t.counts)
        is_head = arange(len(row_E), row_E) - t.offsets[row_E] < t.heads[row_E]
        head = np.nonzero(is_head & (parts_E > 0))[0]
        drawn = np.nonzero(~is_head & (rest_N[row_E] > 0))[0]
        heads_N = np.bincount(row_E[head], minlength=len(t))
        drawn_N = np.bincount(row_E[drawn], minlength=len(t))

        # The heaviest first, of equal ones the lowest rank; the others by rank.
        head = head[np.lexsort((ranks_E[head], -parts_E[head], row_E[head]))]
        first = (np.cumsum(heads_N) - heads_N)[heads_N > 0]
        heaviest, others = head[first], np.delete(head, first)
        others = by_rank(others, row_E, ranks_E)
        drawn = by_rank(drawn, row_E, ranks_E)

        has_N = drawn_N > 0
        parameter = int((-(-rest_N[has_N] * 65536 // drawn_N[has_N])).max(initial=0))
        writer.put(heads_N, LEVELS)
        writer.put(drawn_N, LEVELS)
        writer.put(parts_E[others], LEVELS)
        writer.put(_rest(drawn_N[has_N], parameter) - rest_N[has_N], LEVELS)
        writer.put(ranks_E[heaviest], RANKS)
        writer.put(gaps(ranks_E[others], np.maximum(heads_N - 1, 0)), RANKS)
        writer.put(gaps(ranks_E[drawn], drawn_N), RANKS)
        return parameter

    def take(self, reader: SymbolReader, n: int, parameter: int, truth: bool, file: str) -> Fields:
        heads_N, drawn_N = reader.take(n, LEVELS), reader.take(n, LEVELS)
        led_N, has_N = heads_N > 0, drawn_N > 0
        others_N = heads_N - 1
        others_N[~led_N] = 0
        num_led, num_others, num_drawn = int(led_N.sum()), int(others_N.sum()), int(drawn_N.sum())
        parts = reader.take(num_others, LEVELS)
        rest_N = zeros(n, heads_N)
        rest_N[has_N] = _rest(drawn_N[has_N], parameter) - reader.take(int(has_N.sum()), LEVELS)
        sums = zeros(num_others + 1, heads_N)
        sums[1:] = parts.cumsum(0)
        ends_N = others_N.cumsum(0)
        heaviest_N = GRID - rest_N - (sums[ends_N] - sums[ends_N - others_N])
        empty_N = ~(led_N | has_N)
        sound_N = ((heaviest_N > 0) == led_N) & (heaviest_N >= 0) | empty_N
        sound_N &= (rest_N > 0) == has_N
        if not bool(sound_N.all()) or not bool((parts > 0).all()):
            raise CorruptBlockError(file, f"weights that add up to {GRID}", "others")

        counts_N = heads_N + drawn_N
        starts_N = offsets(counts_N)[:-1]
        total = num_led + num_others + num_drawn
        at_led = starts_N[led_N]
        at_others = places(others_N, starts_N + 1, num_others)
        at_drawn = places(drawn_N, starts_N + heads_N, num_drawn)
        ranks_E = zeros(total, heads_N)
        ranks_E[at_led] = reader.take(num_led, RANKS)
        ranks_E[at_others] = rising(reader.take(num_others, RANKS), others_N, num_others)
        ranks_E[at_drawn] = rising(reader.take(num_drawn, RANKS), drawn_N, num_drawn)
        weights_E = ratio(zeros(total, heads_N), 1)
        weights_E[at_led] = ratio(heaviest_N[led_N], GRID)
        weights_E[at_others] = ratio(parts, GRID)
        shared_N = ratio(rest_N, drawn_N.clip(1) * GRID)
        weights_E[at_drawn] = repeat(shared_N, drawn_N, num_drawn)
        tail_N = ratio(zeros(n, heads_N), 1)
        return {
            "ranks": ranks_E,
            "counts": counts_N,
            "weights": weights_E,
            "tail": tail_N,
            "heads": heads_N,
        }

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
        import torch

        from megadistill.targets.distributions import FIXED_POINT, Distributions, VocabularySlice

        keep_N = t.counts > 0
        if not keep_N.any():
            return t
        ids_NK, weights_NK = t.padded()
        ids_NK, weights_NK = ids_NK[keep_N], weights_NK[keep_N]
        starts = [
            torch.from_numpy(
                uniforms(keys_N[keep_N], np.array([times]), seed=seed, purpose=purpose)
            )
            for purpose in (TRUNCATE, TRUNCATE_ROUND)
        ]
        # A row's entries are the ids of its vocabulary. Padding has weight 0: it is never drawn.
        fixed_NK = torch.from_numpy(np.rint(weights_NK.astype(np.float64) * FIXED_POINT)).long()
        entries = Distributions(
            torch.from_numpy(weights_NK), fixed_NK, VocabularySlice(0, weights_NK.shape[1])
        )
        chosen = threshold_sample(
            entries,
            starts[0][:, 0],
            tau=values["tau"],
            temperature=t.temperature,
            rounding=starts[1][:, 0] >> 12,
        )
        row_E = np.repeat(np.arange(len(ids_NK)), chosen.counts.numpy())
        ids_E = torch.from_numpy(ids_NK[row_E, chosen.ids.numpy()])
        kept = spread(dataclasses.replace(chosen, ids=ids_E), torch.from_numpy(keep_N)).numpy()
        return dataclasses.replace(kept, entropy=t.entropy, nll=t.nll)


def threshold_sample(
    distributions: Distributions, start_N: torch.Tensor, *, tau: float, **common: Any
) -> SparseTargets:
    """Threshold sampling. start_N: int64 in [0, 2^44). Overwrites the distributions."""
    import torch

    from megadistill.targets.distributions import BLOCK, FIXED_POINT, find, offsets_of

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
        method=VAROPT.name,
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
    import torch

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


def _rest(drawn: Any, parameter: int) -> Any:
    """The most that `drawn` sampled entries weigh together, in 1/GRID.

    r is near m * tau wherever there are several: what it lacks of that takes 3 bits, r itself 6.
    """
    return (drawn * parameter) >> 16


VAROPT = Varopt()
