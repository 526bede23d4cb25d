"""multinomial: draws with replacement (random sampling distillation, arXiv 2503.16870).

An id that is drawn c times of n weighs c / n: E[weight] = probability for every id, and a
position's weights sum to 1. At equal entries the variance is 3 to 5 times that of varopt.

On disk a weight is a count over the number of draws, which stands in the header. Streams:

    entries [N] | counts less one | gaps between ranks

Shape letters: N positions, M draws, E entries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from megadistill.errors import CorruptBlockError
from megadistill.storage.counter_rng import SELECT, below, uniforms
from megadistill.targets.method import Fields, SparseMethod, Values
from megadistill.targets.sparse import SparseTargets
from megadistill.targets.streams.ragged_rows import by_rank, gaps, ratio, rising, zeros
from megadistill.targets.streams.symbols import LEVELS, RANKS, SymbolReader, SymbolWriter

if TYPE_CHECKING:
    import torch

    from megadistill.targets.distributions import Distributions, Positions

_MOST_DRAWS = 1 << 16


class Multinomial(SparseMethod):
    """Counts of draws with replacement."""

    name, byte = "multinomial", 1
    parameters = ("draws",)
    sampled = True
    reports_listed_mass = False
    bytes_an_entry, bytes_per_position = 1.8, 2.0

    def expected_entries(self, values: Values) -> float:
        """Returns 1.9 * sqrt(draws) different ids: a teacher of 2 nats (1.2 to 4.1 were seen)."""
        return 1.9 * math.sqrt(values["draws"])

    def largest_entries(self, values: Values) -> int:
        return int(values["draws"])

    def select(
        self, positions: Positions, values: Values, *, seed: int, **common: Any
    ) -> SparseTargets:
        import torch

        keys_N = positions.keys_N
        draws_M = torch.arange(values["draws"], device=keys_N.device)
        uniforms_NM = uniforms(keys_N, draws_M, seed=seed, purpose=SELECT)
        return _draw(positions.distributions, uniforms_NM, **common)

    def put(self, writer: SymbolWriter, t: SparseTargets, ranks_E: np.ndarray) -> int:
        """Append the streams; returns the number of draws."""
        draws = _draws(t.weights)
        row_E = np.repeat(np.arange(len(t)), t.counts)
        order = by_rank(np.arange(len(row_E)), row_E, ranks_E)
        counts_E = np.rint(t.weights[order].astype(np.float64) * draws).astype(np.int64)
        writer.put(t.counts, LEVELS)
        writer.put(counts_E - 1, LEVELS)
        writer.put(gaps(ranks_E[order], t.counts), RANKS)
        return draws

    def take(self, reader: SymbolReader, n: int, parameter: int, truth: bool, file: str) -> Fields:
        counts_N = reader.take(n, LEVELS)
        total = int(counts_N.sum())
        hits_E = reader.take(total, LEVELS) + 1
        sums = zeros(total + 1, counts_N)
        sums[1:] = hits_E.cumsum(0)
        ends_N = counts_N.cumsum(0)
        wrong_N = (sums[ends_N] - sums[ends_N - counts_N] != parameter) & (counts_N > 0)
        if bool(wrong_N.any()):
            raise CorruptBlockError(file, f"{parameter} draws a position", "others")
        return {
            "ranks": rising(reader.take(total, RANKS), counts_N, total),
            "counts": counts_N,
            "weights": ratio(hits_E, max(parameter, 1)),
            "tail": ratio(zeros(n, counts_N), 1),
        }


def _draw(distributions: Distributions, uniforms_NM: torch.Tensor, **common: Any) -> SparseTargets:
    """A draw with replacement for each of uniforms_NM, int64 in [0, 2^44)."""
    import torch

    from megadistill.targets.distributions import find, offsets_of

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
        method=MULTINOMIAL.name,
        offsets=offsets_of(new_NM.sum(1)),
        ids=keys_E & 0xFFFFFFFF,
        weights=((draws - (keys_E >> 32)).double() / draws).float(),
        tail=torch.zeros_like(total_N, dtype=torch.float32),
        **common,
    )


def _draws(weights_E: np.ndarray) -> int:
    """The least number of draws of which all weights are whole parts."""
    weights = np.unique(weights_E).astype(np.float64)
    if not len(weights):
        return 0
    for count in range(1, _MOST_DRAWS):  # of the least likely entry: 1, but by rare accident
        draws = round(count / weights[0]) if weights[0] > 0 else _MOST_DRAWS
        if draws >= _MOST_DRAWS:
            break
        parts = weights * draws
        # A float32 is off by 2^-24 of itself at most.
        if (np.abs(parts - np.rint(parts)) <= parts * 2.0**-23).all():
            return draws
    raise ValueError(f"weights are no counts of fewer than {_MOST_DRAWS} multinomial draws")


MULTINOMIAL = Multinomial()
