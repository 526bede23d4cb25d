"""The order of training as a batch sampler of torch's DataLoader, which resumes at any step.

The order is that of launch/train.py (data/order.py): global batch g is a function of seed, cache
and settings, and is the same list of sequences at every rank count. Rank r of R takes the r-th of R
equal parts of it. Batches straddle epochs, and nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch.utils.data import Sampler

from megadistill.api.arguments import whole
from megadistill.api.cache_batches import CacheDataset
from megadistill.cache.reader import Cache
from megadistill.config import default_groups
from megadistill.data.order import Order, rank_rows
from megadistill.errors import ArgumentError


class CacheSampler(Sampler[list[int]]):
    """Yields this rank's sequence numbers of each micro-batch. For DataLoader(batch_sampler=...).

    cache         an opened cache, or its CacheDataset
    global_batch  sequences of a step over all ranks
    micro_batch   sequences of one forward pass of a rank; None: all of its step
    rank, world   of data parallelism; by default those of torch.distributed where it is
                  initialised, else 0 and 1
    seed, groups, shuffle  of the order: `order.seed`, `order.groups` (None: the largest divisor of
                  global_batch up to 64), and False for the cache's own order
    max_steps     steps after which iteration ends; None: never

    Iteration begins after the last step drawn, so that a new `for` loop continues. ArgumentError
    (a ValueError) for sizes that do not divide each other.
    """

    def __init__(
        self,
        cache: Cache | CacheDataset,
        *,
        global_batch: int,
        micro_batch: int | None = None,
        rank: int | None = None,
        world: int | None = None,
        seed: int = 0,
        groups: int | None = None,
        shuffle: bool = True,
        max_steps: int | None = None,
    ) -> None:
        cache = cache.cache if isinstance(cache, CacheDataset) else cache
        self.global_batch = whole("global_batch", global_batch)
        self.rank, self.world = _rank_and_world(rank, world)
        if self.global_batch % self.world:
            raise ArgumentError(
                f"global_batch is {global_batch}, expected a multiple of world {self.world}"
            )
        share = self.global_batch // self.world
        self.micro_batch = share if micro_batch is None else whole("micro_batch", micro_batch)
        if share % self.micro_batch:
            raise ArgumentError(
                f"micro_batch is {micro_batch}, expected a divisor of {share}, this rank's "
                "sequences of a step"
            )
        groups = default_groups(self.global_batch) if groups is None else whole("groups", groups)
        if shuffle and self.global_batch % groups:
            raise ArgumentError(
                f"groups is {groups}, expected a divisor of global_batch {global_batch}"
            )
        self.max_steps = None if max_steps is None else whole("max_steps", max_steps, least=0)
        self.grad_accum_steps = share // self.micro_batch
        block_size = cache.store.block_size
        self._settings = {
            "global_batch": self.global_batch,
            "seed": int(seed),
            "groups": groups,
            "shuffle": int(shuffle),
            "num_sequences": len(cache),
            "block_size": block_size,
        }
        self._order = Order(
            [len(cache)],
            block_size=block_size,
            global_batch=self.global_batch,
            seed=seed,
            groups=groups,
            shuffle="shuffle" if shuffle else "sequential",
        )
        self._drawn = 0  # micro-batches

    def __iter__(self) -> Iterator[list[int]]:
        step, rows = -1, []
        while self.max_steps is None or self._drawn < self.max_steps * self.grad_accum_steps:
            wanted, number = divmod(self._drawn, self.grad_accum_steps)
            if wanted != step:
                step, rows = wanted, self.step_rows(wanted)
            self._drawn += 1
            yield rows[number * self.micro_batch : (number + 1) * self.micro_batch]

    def __len__(self) -> int:
        """Return the micro-batches to come. TypeError without max_steps."""
        if self.max_steps is None:
            raise TypeError("CacheSampler has no length without max_steps")
        return max(0, self.max_steps * self.grad_accum_steps - self._drawn)

    def step_rows(self, step: int) -> list[int]:
        """Return this rank's sequence numbers of a step, counted from 0."""
        rows = rank_rows(self._order.batch(step), self.rank, self.world)
        return [sequence for _, sequence in rows]

    def state_dict(self, steps: int | None = None) -> dict[str, int]:
        """Return the state to resume from, equal on all ranks.

        steps: the steps that the loop has trained. A DataLoader with workers draws ahead of its
        loop, so that the sampler cannot know. None: the whole steps drawn, right without workers.
        """
        done = (
            self._drawn // self.grad_accum_steps
            if steps is None
            else whole("steps", steps, least=0)
        )
        return {"consumed": done * self.global_batch, **self._settings}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue after the step that `state` was taken at, at any rank count and micro_batch.

        ArgumentError where the order is another one.
        """
        for name, value in self._settings.items():
            if state.get(name) != value:
                raise ArgumentError(
                    f"state: {name} is {state.get(name)}, this sampler's is {value}: the order "
                    "would be another one; make the sampler with the value of the state"
                )
        consumed = state.get("consumed", -1)
        if consumed < 0 or consumed % self.global_batch:
            raise ArgumentError(
                f"state: consumed is {consumed}, expected a multiple of global_batch "
                f"{self.global_batch}"
            )
        self._drawn = consumed // self.global_batch * self.grad_accum_steps


def _rank_and_world(rank: int | None, world: int | None) -> tuple[int, int]:
    if (rank is None) != (world is None):
        raise ArgumentError(f"rank is {rank} and world {world}, expected both or neither")
    if rank is None or world is None:
        started = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
    world = whole("world", world)
    if not 0 <= rank < world:
        raise ArgumentError(f"rank is {rank}, expected 0 to {world - 1}")
    return rank, world
