"""A method of targets as another distribution has it: the ids of at least a probability.

Copied into a distribution by tests/targets/test_outside_method.py.
"""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType

import numpy as np

from megadistill.errors import CorruptBlockError
from megadistill.targets import SparseMethod, SparseTargets
from megadistill.targets.streams.ragged_rows import ratio, zeros
from megadistill.targets.streams.symbols import LEVELS, RANKS

STEPS = 1000


class AtLeast(SparseMethod):
    """The ids of probability `least` and more, and always the most probable one."""

    name, byte = "at_least", 200
    parameters = ("least", "most")
    defaults = MappingProxyType({"most": 8})
    retruncated_by = ("least",)
    grows_to = MappingProxyType({"least": 1.0})

    def check(self, values):
        if not 0 < values["least"] <= 1:
            raise ValueError(f"least is {values['least']}, expected above 0 and at most 1")

    def expected_entries(self, values):
        return min(2.0, values["most"])

    def largest_entries(self, values):
        return min(values["most"], math.floor(1 / values["least"]) + 1)

    def select(self, positions, values, *, seed, **common):
        from megadistill.targets.distributions import offsets_of

        ids_NK, log_probs_NK, _ = positions.distributions.best(self.largest_entries(values))
        probs_NK = log_probs_NK.exp()
        keep_NK = probs_NK >= values["least"]
        keep_NK[:, 0] = True
        return SparseTargets(
            offsets=offsets_of(keep_NK.sum(1)),
            ids=ids_NK[keep_NK],
            weights=probs_NK[keep_NK],
            tail=(1 - (probs_NK * keep_NK).sum(1)).clamp(0, 1),
            method=self.name,
            **common,
        )

    def put(self, writer, t, ranks_E):
        writer.put(t.counts, LEVELS)
        writer.put(np.rint(t.weights * STEPS).astype(np.int64), LEVELS)
        writer.put(np.rint(t.tail * STEPS).astype(np.int64), LEVELS)
        writer.put(ranks_E, RANKS)
        return STEPS

    def take(self, reader, n, parameter, truth, file):
        if parameter != STEPS:
            raise CorruptBlockError(file, STEPS, parameter)
        counts_N = reader.take(n, LEVELS)
        total = int(counts_N.sum())
        weights_E, tail_N = reader.take(total, LEVELS), reader.take(n, LEVELS)
        ranks_E = reader.take(total, RANKS) + zeros(total, counts_N)
        return {
            "ranks": ranks_E,
            "counts": counts_N,
            "weights": ratio(weights_E, STEPS),
            "tail": ratio(tail_N, STEPS),
        }

    def retruncate(self, t, values, *, keys_N, labels_N, seed, times):
        row_E = np.repeat(np.arange(len(t)), t.counts)
        first_E = np.arange(len(row_E)) == t.offsets[row_E]
        keep_E = first_E | (t.weights >= values["least"])
        counts_N = np.bincount(row_E[keep_E], minlength=len(t))
        dropped_N = np.bincount(row_E[~keep_E], t.weights[~keep_E], minlength=len(t))
        return dataclasses.replace(
            t,
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_N)]),
            ids=t.ids[keep_E],
            weights=t.weights[keep_E],
            tail=(t.tail + dropped_N).astype(np.float32),
        )


AT_LEAST = AtLeast()
