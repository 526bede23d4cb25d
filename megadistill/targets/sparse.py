"""Sparse targets: the entries of a teacher's distributions that are kept.

A position's target is a ragged row of (token id, weight). Rows are stored one after another
(compressed sparse rows), as numpy arrays or torch tensors alike; importing this costs no torch.

Shape letters: N positions, E entries of all positions, K entries of the longest row.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from megadistill.targets.registered import METHODS, is_sparse, sparse_names

PER_POSITION = ("tail", "entropy", "nll", "heads", "truth_added", "rounding")  # fields of [N]

# Of positions without a target; 0 in the other fields.
_FILL = {"entropy": math.nan, "nll": math.nan}

Array = Any  # np.ndarray or torch.Tensor; one SparseTargets holds one kind


@dataclass(frozen=True)
class SparseTargets:
    """The targets of N positions, ragged.

    offsets      int64 [N+1]; row n is entries offsets[n] to offsets[n+1]
    ids          int64 [E] token ids; no id twice in a row
    weights      float32 [E]; topk, topp: probabilities. varopt, multinomial: unbiased estimates
                 of the probabilities, which sum to 1 over a row
    tail         float32 [N]; the probability that the row leaves out (0 for sampled methods)
    method       a registered method of sparse targets, see targets/method.py
    temperature  the teacher's softmax temperature the row was made at
    entropy      float32 [N] or None; of the teacher's distribution at `temperature`, in nats
    nll          float32 [N] or None; minus the teacher's log-probability of the true next token, in
                 nats; nan where there is no true next token
    heads        int64 [N] or None; varopt only: the first heads[n] entries of row n are kept with
                 their own probability, the others were sampled and have equal weights
    truth_added  bool [N] or None; topk, topp only: the row's last entry is the ground-truth id,
                 added because it was not among the most probable
    rounding     int64 [N] or None; the position's own random number in [0, 2^32), with which a
                 codec rounds its weights without bias

    A row may be empty: the position has no target.
    """

    offsets: Array
    ids: Array
    weights: Array
    tail: Array
    method: str
    temperature: float = 1.0
    entropy: Array | None = None
    nll: Array | None = None
    heads: Array | None = None
    truth_added: Array | None = None
    rounding: Array | None = None

    def __post_init__(self) -> None:
        if not is_sparse(self.method):
            names = ", ".join(sparse_names())
            raise ValueError(f"method is {self.method!r}, expected one of {names}")
        if len(self.offsets) != len(self.tail) + 1:
            raise ValueError(
                f"offsets has {len(self.offsets)} elements, expected {len(self.tail) + 1}: "
                "one more than tail has"
            )
        if len(self.ids) != len(self.weights):
            raise ValueError(f"{len(self.ids)} ids and {len(self.weights)} weights, expected equal")

    def __len__(self) -> int:
        return len(self.tail)

    @property
    def is_sampled(self) -> bool:
        """Whether weights are unbiased estimates of single probabilities."""
        return bool(METHODS.get(self.method).sampled)

    @property
    def counts(self) -> Array:
        """int64 [N]: entries of each row."""
        return self.offsets[1:] - self.offsets[:-1]

    def rows(self, start: int, stop: int) -> SparseTargets:
        """Positions start to stop, as targets of their own (views, no copy but the offsets)."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        cut: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[start:stop]
            for name in PER_POSITION
        }
        return dataclasses.replace(
            self,
            offsets=self.offsets[start : stop + 1] - first,
            ids=self.ids[first:last],
            weights=self.weights[first:last],
            **cut,
        )

    def take(self, rows: Any) -> SparseTargets:
        """The positions that `rows`, an int64 tensor, picks: ids, weights and tail, no more."""
        import torch

        counts = self.counts[rows]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        entries = torch.arange(int(offsets[-1]), device=counts.device)
        entries += torch.repeat_interleave(self.offsets[:-1][rows] - offsets[:-1], counts)
        return SparseTargets(
            offsets,
            self.ids[entries],
            self.weights[entries],
            self.tail[rows],
            self.method,
            self.temperature,
        )

    # The protocol of targets/kinds.py.
    needs_projector: ClassVar[bool] = False
    all_have_targets: ClassVar[bool] = False
    dense: ClassVar[None] = None

    @property
    def listed(self) -> SparseTargets:
        return self

    @property
    def members(self) -> tuple[tuple[SparseTargets, float], ...]:
        return ((self, 1.0),)

    def has_targets(self) -> Array:
        """bool [N]: the rows that are not empty."""
        return self.counts > 0

    def count_targets(self) -> int:
        return int(self.has_targets().sum())

    def entropy_sum(self, positions_N: Array) -> float:
        """Nats by which a sampled row's cross-entropy exceeds its KL, over these positions.

        From a cache each is off by up to sqrt(entropy) / 45 nats, either way (cache/quantizer.py).
        """
        if not self.is_sampled:
            return 0.0
        if self.entropy is None:
            return math.nan
        return float(self.entropy[positions_N & self.has_targets()].sum())

    def padded(self) -> tuple[Array, Array]:
        """(ids_NK int64, weights_NK float32), K the longest row; padding is id 0, weight 0."""
        counts = self.counts
        k = int(counts.max()) if len(counts) else 0
        if isinstance(self.ids, np.ndarray):
            mask_NK = np.arange(k)[None, :] < counts[:, None]
            ids_NK = np.zeros(mask_NK.shape, np.int64)
            weights_NK = np.zeros(mask_NK.shape, np.float32)
        else:
            import torch

            mask_NK = torch.arange(k, device=self.ids.device)[None, :] < counts[:, None]
            ids_NK = self.ids.new_zeros(mask_NK.shape)
            weights_NK = self.weights.new_zeros(mask_NK.shape)
        ids_NK[mask_NK] = self.ids
        weights_NK[mask_NK] = self.weights
        return ids_NK, weights_NK

    def numpy(self) -> SparseTargets:
        """The same targets as numpy arrays."""
        return self._map(lambda a: a if isinstance(a, np.ndarray) else a.detach().cpu().numpy())

    def torch(self, device: Any = "cpu") -> SparseTargets:
        """The same targets as torch tensors on `device`."""
        import torch

        return self._map(lambda a: torch.as_tensor(a, device=device))

    def _map(self, convert: Any) -> SparseTargets:
        fields: dict[str, Any] = {
            f.name: convert(value)
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) is not None
            and f.name not in ("method", "temperature")
        }
        return dataclasses.replace(self, **fields)


def concatenate(parts: list[SparseTargets]) -> SparseTargets:
    """The rows of all parts, one after another. All must be of one method and temperature."""
    first = parts[0]
    for part in parts[1:]:
        if (part.method, part.temperature) != (first.method, first.temperature):
            raise ValueError(
                f"cannot join targets of {first.method} at temperature {first.temperature} with "
                f"{part.method} at {part.temperature}"
            )
    if isinstance(first.ids, np.ndarray):
        join: Any = np.concatenate
    else:
        import torch

        join = torch.cat
    offsets, base = [first.offsets[:1] * 0], 0
    for part in parts:
        offsets.append(part.offsets[1:] + base)
        base += int(part.offsets[-1])
    joined: dict[str, Any] = {
        name: None if getattr(first, name) is None else join([getattr(p, name) for p in parts])
        for name in ("ids", "weights", *PER_POSITION)
    }
    return dataclasses.replace(first, offsets=join(offsets), **joined)


def spread(targets: SparseTargets, keep_N: Any) -> SparseTargets:
    """Rows for all N positions: those of `targets` where keep_N, empty ones elsewhere. Of torch."""
    import torch

    counts_N = keep_N.new_zeros(len(keep_N), dtype=torch.int64)
    counts_N[keep_N] = targets.counts
    spread: dict[str, Any] = {}
    for name in PER_POSITION:
        values = getattr(targets, name)
        if values is not None:
            spread[name] = values.new_full((len(keep_N),), _FILL.get(name, 0))
            spread[name][keep_N] = values
    return SparseTargets(
        offsets=torch.nn.functional.pad(counts_N.cumsum(0), (1, 0)),
        ids=targets.ids,
        weights=targets.weights,
        method=targets.method,
        temperature=targets.temperature,
        **spread,
    )
