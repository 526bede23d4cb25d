"""Prefetching of a rank's data for each step: verified, decoded, in the order's sequence.

The order says which sequences form global batch g; rank r of R takes the r-th of R equal parts of
it. Threads read and decode: two of them gave 2.0 to 2.8 million positions/s of `varopt`, two
processes, which send every array through a pipe, 0.8 to 1.4 (two busy CPU cores, sequences of
2,048; a 1B student on one H200 takes 0.065). Memory is bounded by AHEAD steps of this rank.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from megadistill.blocks import BlockReader
from megadistill.data.order import Order, rank_rows
from megadistill.errors import StoreError
from megadistill.train.training_source import MicroBatch, TrainingSource, micro_batch

AHEAD = 2  # steps read in advance: one to hide reading behind, one against its variance
WORKERS = 2
FETCH_AHEAD = 16  # steps whose shards are downloaded in advance, from remote stores
DOWNLOADS = 8  # at a time, a rank

Names = list[tuple[int, int]]  # (store, sequence) of each row


class Batches:
    """Prefetches this rank's micro-batches of each step, from step `first` on. A context manager.

    `next` raises an error of reading at the step that it concerns.
    """

    def __init__(
        self,
        stores: list[TrainingSource],
        order: Order,
        *,
        rank: int,
        world: int,
        micro_batch: int,
        with_targets: bool,
        first: int,
        last: int,
    ) -> None:
        self._stores, self._order, self._with_targets = stores, order, with_targets
        self._rank, self._world, self._micro_batch = rank, world, micro_batch
        self._to_come = iter(range(first, last))
        self._named: deque[Names] = deque()  # steps whose shards are on their way
        self._read: deque[list[Future[MicroBatch]]] = deque()
        self._readers = ThreadPoolExecutor(WORKERS, thread_name_prefix="batches")
        self._fetchers = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="downloads")
        # (store, which of its teachers', block) -> the step that asked last
        self._asked: dict[tuple[int, int, int], int] = {}
        every = [each for s in stores for each in (s, *s.other_teachers)]
        self._fetch_ahead = FETCH_AHEAD if any(s.store.is_remote for s in every) else 0

    def __enter__(self) -> Batches:
        for _ in range(AHEAD):
            self._begin_next()
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._readers, self._fetchers):
            pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if not self._read:
            raise StopIteration
        step = self._read.popleft()
        self._begin_next()
        return [future.result() for future in step]

    def names(self, step: int) -> Names:
        """Returns this rank's rows of global batch `step`."""
        return rank_rows(self._order.batch(step), self._rank, self._world)

    def _begin_next(self) -> None:
        """Starts reading the next step, if there is one."""
        for step in self._to_come:
            self._named.append(self.names(step))
            if self._fetch_ahead:
                self._fetch(step, self._named[-1])
            if len(self._named) > self._fetch_ahead:
                break
        if self._named:
            names, size = self._named.popleft(), self._micro_batch
            self._read.append(
                [self._begin(names[i : i + size]) for i in range(0, len(names), size)]
            )

    def _begin(self, names: Names) -> Future[MicroBatch]:
        return self._readers.submit(
            micro_batch, self._stores, names, with_targets=self._with_targets
        )

    def _fetch(self, step: int, names: Names) -> None:
        """Starts downloading the shards of a step, less those requested recently."""
        for k, i in names:
            first = self._stores[k]
            for teacher, each in enumerate((first, *first.other_teachers)):
                store, block = each.store, each.number(i) // each.store.block_size
                place = (k, teacher, block)
                if store.is_remote and step - self._asked.get(place, -FETCH_AHEAD) >= FETCH_AHEAD:
                    self._asked[place] = step
                    self._fetchers.submit(_fetched, store, block)


def _fetched(store: BlockReader, block: int) -> None:
    # What is wrong is found again, and told, by who reads.
    with contextlib.suppress(StoreError), store.shard_file(block):
        pass
