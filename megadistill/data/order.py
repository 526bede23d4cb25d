"""Which sequences form global batch g: a pure function of the seed, the stores and the settings.

All positions of training are numbered on one line, p = epoch * n + i with n the number of
sequences; global batch g takes p = g * B .. g * B + B - 1, so batches straddle epochs and nothing
is dropped. The number of sequences consumed is all there is to resume.

`sequential`: position i of an epoch is sequence i.

`shuffle`, so that a host that takes some rows of every batch needs some blocks only:

1. Each epoch permutes the blocks and lays their sequences end to end: n places in a line.
2. The line is cut into G groups. Position p belongs to group p mod G, and a group's slice of the
   line is exactly as long as it has positions in this epoch. So every batch, also one that
   straddles epochs, has B / G rows of every group, and groups end together, whatever the sizes of
   the blocks. The price: up to G - 1 blocks lie across a cut and are read by two groups.
3. Within its slice a group goes through windows of a few blocks' worth of sequences, each shuffled.

The rows of a batch are sorted by group: ranks, which take consecutive rows, get whole groups when
their number divides G.

With weights each store has a line of its own, pass after pass, and `mixture` says which line each
position takes from, and at which of its positions. An epoch is `weight` passes over every store. A
batch has a store's share of rows, and of each group of that store equally many but for one, so that
the groups at the border between two hosts are read by both: the price of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np

from megadistill.config.training_rules import groups_problems
from megadistill.data.mixture import Mixture
from megadistill.errors import ConfigError
from megadistill.storage.counter_rng import key, permutation

# What a host keeps at hand per group. Measured in blocks: 4 of 256 sequences shuffle 1,024 ways.
WINDOW_BLOCKS = 4
_BLOCKS, _WINDOW, _SOURCE = 1, 2, 3  # purposes: two permutations never share a key


def rank_rows(rows: list[tuple[int, int]], rank: int, ranks: int) -> list[tuple[int, int]]:
    """The rows of a global batch that are one rank's: consecutive, equally many for each."""
    share = len(rows) // ranks
    return rows[rank * share : (rank + 1) * share]


class Order:
    """The order of training over one or more stores.

    `sizes`: sequences in each store. `block_size`: sequences a block, of all stores or of each;
    only a store's last block may be shorter. `weights`: passes over each store in an epoch; without
    them, or where all are 1, several stores are dealt as if they were one.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        block_size: int | Sequence[int],
        global_batch: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        groups: int = 64,
        shuffle: Literal["shuffle", "sequential"] = "shuffle",
    ) -> None:
        blocks = [block_size] * len(sizes) if isinstance(block_size, int) else list(block_size)
        mixed = weights is not None and any(w != 1 for w in weights)
        if sum(sizes) < 1 or (mixed and min(sizes) < 1):
            raise ConfigError(
                "cache.dir: there is no sequence to train on: generate the cache first"
            )
        for problem in groups_problems(groups, global_batch) if shuffle == "shuffle" else ():
            raise ConfigError(str(problem))
        self.global_batch, self.groups, self.shuffle = global_batch, groups, shuffle
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._mixture: Mixture | None = None
        if mixed:
            assert weights is not None
            amounts = [Fraction(str(w)) * n for w, n in zip(weights, sizes, strict=True)]
            self._mixture = Mixture(amounts)
            self.num_sequences = max(1, round(sum(amounts)))
            self._lines = [
                _Line([n], [b], seed=key(seed, _SOURCE, k), groups=groups, shuffle=shuffle)
                for k, (n, b) in enumerate(zip(sizes, blocks, strict=True))
            ]
        else:
            self.num_sequences = sum(sizes)
            self._lines = [_Line(sizes, blocks, seed=seed, groups=groups, shuffle=shuffle)]

    def batch(self, g: int) -> list[tuple[int, int]]:
        """Global batch `g`: (store, sequence within the store) of each of its rows, in order."""
        positions = g * self.global_batch + np.arange(self.global_batch, dtype=np.int64)
        source, turn = np.zeros_like(positions), positions
        if self._mixture is not None:
            source, turn = self._mixture.draws(positions)
        if self.shuffle == "shuffle":
            by_group = np.argsort(turn % self.groups, kind="stable")
            source, turn = source[by_group], turn[by_group]
        places = np.empty_like(turn)  # numbered through all stores
        for k, line in enumerate(self._lines):
            rows = source == k
            places[rows] = self._starts[k] + line.sequences(turn[rows])
        store = np.searchsorted(self._starts, places, side="right") - 1
        return list(zip(store.tolist(), (places - self._starts[store]).tolist(), strict=True))


class _Line:
    """Endless passes over stores that are dealt as if they were one."""

    def __init__(
        self,
        sizes: Sequence[int],
        block_sizes: Sequence[int],
        *,
        seed: int,
        groups: int,
        shuffle: Literal["shuffle", "sequential"],
    ) -> None:
        self.num_sequences = sum(sizes)
        self.groups, self.seed, self.shuffle = groups, seed, shuffle
        self.window = WINDOW_BLOCKS * max(block_sizes)
        # Blocks of all stores in one table: where each begins in all sequences, and its length.
        starts = np.cumsum([0, *sizes])
        firsts = [
            np.arange(0, size, block) + start
            for size, block, start in zip(sizes, block_sizes, starts, strict=False)
        ]
        self._first = np.concatenate(firsts).astype(np.int64)
        self._length = np.diff(self._first, append=self.num_sequences)
        self._epoch = lru_cache(maxsize=2)(self._lay_out)
        # One window a group is open at a time; twice that where a batch straddles two.
        self._permutation = lru_cache(maxsize=4 * groups)(permutation)

    def sequences(self, positions: np.ndarray) -> np.ndarray:
        """int64: the sequences at these positions, numbered through the stores."""
        if self.shuffle == "sequential":
            return positions % self.num_sequences
        epochs = positions // self.num_sequences
        places = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            places[rows] = self._shuffled(epoch, positions[rows])
        return places

    def _shuffled(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The sequences at `positions` (numbered through all epochs) of one epoch."""
        blocks, block_starts, first, count, slice_start = self._epoch(epoch)
        group = positions % self.groups
        turn = (positions - first[group]) // self.groups  # the how-manieth of its group
        window, inside = np.divmod(turn, self.window)
        line = slice_start[group] + window * self.window
        both = group * (int(window.max()) + 1) + window
        for each in np.unique(both):
            rows = np.flatnonzero(both == each)
            k, w = int(group[rows[0]]), int(window[rows[0]])
            length = min(self.window, int(count[k]) - w * self.window)
            shuffled = self._permutation(length, self.seed, _WINDOW, epoch, k, w)
            line[rows] += shuffled[inside[rows]]
        at = np.searchsorted(block_starts, line, side="right") - 1
        return self._first[blocks[at]] + line - block_starts[at]

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, ...]:
        """How an epoch is laid out.

        The permuted blocks and where each begins in the line; each group's first position, number
        of positions, and where its slice of the line begins.
        """
        blocks = permutation(len(self._first), self.seed, _BLOCKS, epoch)
        lengths = self._length[blocks]
        start = epoch * self.num_sequences
        ahead = (np.arange(self.groups) - start) % self.groups
        count = np.maximum(0, -((ahead - self.num_sequences) // self.groups))
        return blocks, np.cumsum(lengths) - lengths, start + ahead, count, np.cumsum(count) - count
