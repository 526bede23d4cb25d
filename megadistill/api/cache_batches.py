"""Sequences of a cache for torch's DataLoader, and batches of them.

    DataLoader(CacheDataset(cache), batch_sampler=CacheSampler(cache, ...), collate_fn=collate)

Shapes: B sequences, T positions, N = B*T.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megadistill.cache.reader import Cache
from megadistill.errors import ArgumentError, StoreError
from megadistill.models.packed_sequences import IGNORED, sample_labels
from megadistill.targets import PER_POSITION, SparseTargets, concatenate

Sample = dict[str, Any]


class CacheDataset(Dataset[Sample]):
    """Torch's map-style view of a complete cache. Item i is `cache[i]`, verified on reading.

    Each worker of a DataLoader opens the cache's files for itself. Raises StoreError for an
    incomplete cache, whose sequences would be numbered otherwise once it is complete.
    """

    def __init__(self, cache: Cache) -> None:
        if not isinstance(cache, Cache):
            raise ArgumentError(
                f"cache is a {type(cache).__name__}, expected a Cache, as megadistill.open_cache "
                "returns it"
            )
        if not cache.complete():
            total = cache.num_sequences
            raise StoreError(
                f"{cache.store.name}: is incomplete, {len(cache)} of "
                f"{'unknown' if total is None else total} sequences: run launch/generate.py again, "
                "which resumes it"
            )
        self.cache, self._length, self._pid = cache, len(cache), os.getpid()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if self._pid != os.getpid():
            # A lock that another thread held at the fork would stay locked here.
            self.cache = Cache(copy.copy(self.cache.store), device=self.cache.device)
            self._pid = os.getpid()
        return self.cache[index]


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass, as torch tensors.

    tokens_BT  int64 [B, T]
    labels_BT  int64 [B, T]: the true next tokens; -100 where there is none to learn
    documents  of each sequence the positions where its documents start, numpy arrays
    targets    of N positions, in the order of tokens_BT.flatten()
    padding_B  int64 [B]: tokens of padding at the end of each sequence
    kd_count   positions with a label and a target
    ce_count   positions with a label
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    documents: list[np.ndarray]
    targets: SparseTargets
    padding_B: torch.Tensor
    kd_count: int
    ce_count: int

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the same on another device. Documents and padding stay on the host."""

        def move(tensor: Any) -> Any:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            tokens_BT=move(self.tokens_BT),
            labels_BT=move(self.labels_BT),
            targets=_mapped(self.targets, move),
        )

    def pin_memory(self) -> Batch:
        """Return the same in page-locked memory. A DataLoader with pin_memory=True calls it."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.pin_memory(),
            labels_BT=self.labels_BT.pin_memory(),
            targets=_mapped(self.targets, lambda tensor: tensor.pin_memory()),
        )


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Return sequences of caches as one Batch. The collate_fn of a DataLoader.

    samples: as `cache[i]` returns them, of one length, method and temperature.
    """
    lengths = sorted({len(sample["tokens"]) for sample in samples})
    ways = sorted({(s["targets"].method, s["targets"].temperature) for s in samples})
    for name, found in (("tokens", lengths), ("method, temperature", ways)):
        if len(found) != 1:
            raise ArgumentError(f"samples have {name} {found}, expected one for all of a batch")
    labels_BT = np.stack([sample_labels(dict(sample)) for sample in samples])
    targets = concatenate([_without_notes(sample["targets"]) for sample in samples])
    if isinstance(targets.ids, np.ndarray):
        targets = targets.torch()
    learned_N = torch.from_numpy(labels_BT.reshape(-1) != IGNORED)
    has_target_N = (targets.counts > 0).cpu()
    return Batch(
        tokens_BT=torch.from_numpy(np.stack([s["tokens"] for s in samples]).astype(np.int64)),
        labels_BT=torch.from_numpy(labels_BT),
        documents=[np.asarray(s["documents"], np.int64) for s in samples],
        targets=targets,
        padding_B=torch.tensor([int(s.get("padding", 0)) for s in samples]),
        kd_count=int((learned_N & has_target_N).sum()),
        ce_count=int(learned_N.sum()),
    )


def _mapped(
    targets: SparseTargets, change: Callable[[torch.Tensor], torch.Tensor]
) -> SparseTargets:
    fields = {name: getattr(targets, name) for name in ("offsets", "ids", "weights", *PER_POSITION)}
    changed: dict[str, Any] = {k: change(v) for k, v in fields.items() if v is not None}
    return replace(targets, **changed)


def _without_notes(targets: SparseTargets) -> SparseTargets:
    # How an entry was selected is for statistics; the loss needs entries and tail.
    return replace(targets, heads=None, truth_added=None, rounding=None)
