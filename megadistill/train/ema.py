"""An exponential moving average of the student's weights, spread over the ranks as they are.

    average = d * average + (1 - d) * weights      d = min(decay, (1 + t) / (10 + t)), t = 0, 1, ...

t counts earlier updates, so that the average forgets the initial weights: after n updates it
reaches back about n / 9 of them until d is `decay`. A skipped step updates nothing.

ZeRO-3 keeps the fp32 weights as flat partitions, one for each of its sub-groups, on each rank its
own; the average has the same layout and is updated in place, without communication: 4 bytes a
parameter over all ranks, one pass over memory a step. To be resumed at any number of ranks, a rank
saves its partitions with the layout that says which elements of which parameter they are. Nothing
depends on a parameter's shape; one without any dimension DeepSpeed 0.19.8 itself cannot train (its
first broadcast views bytes), one of shape [1] it can.

ZeRO-3 deals a parameter of n elements to R ranks in parts of ceil(n / R), the last padded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megadistill.errors import TrainError

Layout = list[list[tuple[str, int, int]]]  # per sub-group: name, its elements, those of a part


class Ema:
    """The average of the weights that `engine` trains. All methods but `load` are collective."""

    def __init__(self, engine: Any, *, decay: float) -> None:
        self._optimizer, self._decay, self.updates = engine.optimizer, decay, 0
        self._layout: Layout = [
            [(engine.param_names[p], p.ds_numel, p.partition_numel()) for p in group]
            for group in self._optimizer.fp16_groups
        ]
        self._flat = [flat.detach().clone() for flat in self._masters]

    @property
    def _masters(self) -> list[torch.Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average with the weights after a step."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._flat, [flat.detach() for flat in self._masters], 1 - decay)
        self.updates += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Swaps in the average: inside, the engine computes with it, rounded to its own type.

        After an error inside, the engine is not restored and cannot be used.
        """
        partitions = self._optimizer.fp16_partitioned_groups_flat
        # Not made anew from the fp32 weights: those may be the same memory.
        weights = [flat.detach().clone() for flat in partitions]
        self._put(partitions, self._flat)
        yield
        # Not after an error: this is collective, and the others may have left.
        self._put(partitions, weights)

    @torch.no_grad()
    def _put(self, partitions: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        # Small parameters are whole on every rank between steps, and so must be dealt out again.
        self._optimizer.checkpoint_event_prologue()
        for number, (partition, value) in enumerate(zip(partitions, values, strict=True)):
            partition.data.copy_(value)
            self._optimizer._unflatten_partitioned_parameters(number)
        self._optimizer.checkpoint_event_epilogue()

    def save(self, path: Path, *, rank: int, write: Callable[..., Any] = torch.save) -> None:
        """Saves this rank's part to the folder `path`. write: replaces torch.save."""
        write(
            {"updates": self.updates, "layout": self._layout, "flat": self._flat}, _file(path, rank)
        )

    @torch.no_grad()
    def load(self, path: Path, *, rank: int, written_by: int) -> None:
        """Loads this rank's part of what `written_by` ranks saved to `path`."""
        parts = _Parts(path, written_by)
        for flat, layout in zip(self._flat, self._layout, strict=True):
            offset = 0
            for name, size, part in layout:
                target = flat.narrow(0, offset, part)
                target.zero_()
                parts.copy(name, size, target, start=rank * part)
                offset += part
        self.updates = parts.updates


class _Parts:
    """Holds the parts that all ranks of another run saved, by parameter name. Read where needed."""

    def __init__(self, path: Path, world: int) -> None:
        self._places: list[dict[str, torch.Tensor]] = []
        for rank in range(world):
            file = _file(path, rank)
            if not file.is_file():
                raise TrainError(
                    f"{file}: no such file, and train.ema is on: the checkpoint was written "
                    "without; choose another train.out_dir"
                )
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            self.updates = int(saved["updates"])
            self._places.append(
                {
                    name: part
                    for flat, layout in zip(saved["flat"], saved["layout"], strict=True)
                    for name, part in zip(
                        [name for name, _, _ in layout],
                        flat.split([*(n for _, _, n in layout), flat.numel() - _total(layout)]),
                        strict=False,
                    )
                }
            )

    def copy(self, name: str, size: int, target: torch.Tensor, *, start: int) -> None:
        """Copies elements of the parameter, from `start` on, into `target`."""
        stop = min(start + target.numel(), size)
        for rank, places in enumerate(self._places):
            part = places[name]
            first = rank * part.numel()
            a, b = max(start, first), min(stop, first + part.numel())
            if a < b:
                target[a - start : b - start].copy_(part[a - first : b - first])


def _total(layout: list[tuple[str, int, int]]) -> int:
    return sum(part for _, _, part in layout)


def _file(path: Path, rank: int) -> Path:
    return path / f"ema-{rank:05d}.pt"
