"""From stores to micro-batches: what a rank reads for each step, ahead of time, in a thread.

A store is a cache, or a token store where there is nothing to distil (loss.kd_weight=0). The order
says which sequences form global batch g; rank r of R takes the r-th of R equal parts of it.

Shapes: B sequences of a micro-batch, T positions, N = B*T.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from megadistill.attention import forward_inputs
from megadistill.blocks import BlockStore
from megadistill.cache.reader import Cache
from megadistill.data.order import Order
from megadistill.data.packing import labels as packed_labels
from megadistill.errors import ConfigError, StoreError
from megadistill.targets import SparseTargets, concatenate

AHEAD = 2  # steps read in advance: one to hide reading behind, one against its variance


@dataclass(frozen=True)
class Sequences:
    """A store to train or evaluate on. `source[i]` is a sequence's columns, verified."""

    source: Any  # Cache or BlockStore
    store: BlockStore
    has_targets: bool

    def __len__(self) -> int:
        return len(self.store)

    @property
    def name(self) -> str:
        return str(self.store.path)

    @property
    def recipe(self) -> dict[str, Any]:
        return self.store.recipe

    @property
    def tokenizer(self) -> dict[str, Any]:
        return self.recipe["tokenizer"]

    @property
    def seq_len(self) -> int:
        return int(self.recipe["seq_len"])

    @property
    def vocab_size(self) -> int:
        """Ids that may occur: the teacher's, or without one the tokenizer's."""
        return int(self.recipe.get("vocab_size") or self.tokenizer["vocab_size"])


def open_sequences(path: str, *, key: str, with_targets: bool) -> Sequences:
    """The complete store at `path`. `key`: the configuration key, for messages.

    Raises ConfigError for a token store where targets are needed, StoreError for one that is
    missing, incomplete or empty.
    """
    store = BlockStore.open(path)
    if with_targets and store.kind != "cache":
        raise ConfigError(
            f"{key}: {path} is a token store, without targets: generate a cache from it, or set "
            "loss.kd_weight=0 loss.ce_weight=1 to train on its text alone"
        )
    if len(store) == 0:
        raise StoreError(f"{key}: {path} holds no sequence yet: run launch/generate.py first")
    if not store.complete():
        missing = "" if store.num_sequences is None else f" of {store.num_sequences}"
        raise StoreError(
            f"{key}: {path} is incomplete, {len(store)}{missing} sequences: run the command that "
            "made it again, it goes on where it stopped"
        )
    has_targets = store.kind == "cache"
    return Sequences(Cache(store) if has_targets else store, store, has_targets)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass; arrays until `on` brings them to a device.

    names: (store, sequence) of each row. kd_count, ce_count: positions in each term.
    """

    names: list[tuple[int, int]]
    tokens_BT: np.ndarray
    documents: list[np.ndarray]
    labels_N: Any  # int64
    targets: SparseTargets | None
    kd_count: int
    ce_count: int
    inputs: dict[str, Any] = field(default_factory=dict)

    def on(self, model: nn.Module, device: torch.device, *, pack: Any) -> MicroBatch:
        """The same as tensors on `device`, with the keyword arguments of the model's forward."""
        return replace(
            self,
            inputs=forward_inputs(model, self.tokens_BT, self.documents, pack=pack, device=device),
            labels_N=torch.as_tensor(self.labels_N, device=device),
            targets=None if self.targets is None else self.targets.torch(device),
        )


def micro_batch(
    stores: list[Sequences], names: list[tuple[int, int]], *, with_targets: bool, empty: int = 0
) -> MicroBatch:
    """Read the named sequences. The last `empty` of them are there for their shape only."""
    samples = [stores[store].source[sequence] for store, sequence in names]
    labels_BT = np.stack(
        [packed_labels(s["tokens"], s["documents"], s.get("loss_mask")) for s in samples]
    )
    if empty:
        labels_BT[-empty:] = -100
    labels_N = labels_BT.reshape(-1)
    targets = None
    if with_targets:
        targets = concatenate([_without_notes(s["targets"]) for s in samples])
    valid_N = labels_N != -100
    return MicroBatch(
        names=names,
        tokens_BT=np.stack([s["tokens"] for s in samples]),
        documents=[s["documents"] for s in samples],
        labels_N=labels_N,
        targets=targets,
        kd_count=0 if targets is None else int((valid_N & (targets.counts > 0)).sum()),
        ce_count=int(valid_N.sum()),
    )


def _without_notes(targets: SparseTargets) -> SparseTargets:
    # How an entry was chosen is for statistics; the loss needs entries and tail.
    return replace(targets, heads=None, truth_added=None)


class Batches:
    """This rank's micro-batches of each step, from step `first` on. A context manager.

    A thread reads AHEAD steps in advance; what goes wrong in it is raised by `next`.
    """

    def __init__(
        self,
        stores: list[Sequences],
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
        self._queue: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(first, last), name="batches", daemon=True
        )

    def __enter__(self) -> Batches:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        while self._thread.is_alive():
            with_room = self._queue.qsize() == 0
            if not with_room:
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)

    def __next__(self) -> list[MicroBatch]:
        share = self._queue.get()
        if isinstance(share, BaseException):
            raise share
        return share

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def names(self, step: int) -> list[tuple[int, int]]:
        """(store, sequence) of this rank's rows of global batch `step`."""
        rows = self._order.batch(step)
        share = len(rows) // self._world
        return rows[self._rank * share : (self._rank + 1) * share]

    def _read(self, first: int, last: int) -> None:
        try:
            for step in range(first, last):
                names, size = self.names(step), self._micro_batch
                share = [
                    micro_batch(self._stores, names[i : i + size], with_targets=self._with_targets)
                    for i in range(0, len(names), size)
                ]
                self._queue.put(share)
                if self._closed.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised again by the loop
            self._queue.put(error)
