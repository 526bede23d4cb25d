"""Sparse targets: what is kept of a teacher's distributions. The word every room shares.

A position's target is a ragged row of (token id, weight). Rows are stored one after another
(compressed sparse rows), as numpy arrays or torch tensors alike; importing this costs no torch.

Shape letters: N positions, E entries of all positions, K entries of the longest row.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadistill.errors import ConfigError

METHODS = ("varopt", "multinomial", "topk", "topp")
SAMPLED = ("varopt", "multinomial")
DENSE = ("union", "exact", "projected")  # with an online teacher, where nothing has to be kept
PARAMETERS = {
    "varopt": ("tau",),
    "multinomial": ("draws",),
    "topk": ("k",),
    "topp": ("p", "k"),
    "union": ("k",),
    "exact": (),
    "projected": (),
}
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skewed_kl",
    "skewed_reverse_kl",
    "tvd",
    "adaptive_kl",
)
PER_POSITION = ("tail", "entropy", "nll", "heads", "truth_added", "rounding")  # fields of [N]

Array = Any  # np.ndarray or torch.Tensor; one SparseTargets holds one kind


@dataclass(frozen=True)
class SparseTargets:
    """The targets of N positions, ragged.

    offsets      int64 [N+1]; row n is entries offsets[n] to offsets[n+1]
    ids          int64 [E] token ids; no id twice in a row
    weights      float32 [E]; topk, topp: probabilities. varopt, multinomial: unbiased estimates
                 of the probabilities, which sum to 1 over a row
    tail         float32 [N]; the probability that the row leaves out (0 for sampled methods)
    method       one of METHODS
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
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
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


def check_divergence(
    method: str,
    divergence: str,
    *,
    kd_temperature: float,
    made_at: float,
    ground_truth_residual: bool = False,
) -> None:
    """Refuse a divergence that targets of `method` cannot serve (ConfigError).

    Sampled targets are estimates of single probabilities: only what is linear in the teacher's
    distribution, forward KL, stays unbiased, and only at the temperature they were drawn at. They
    leave out no mass that could be put on the true token.
    """
    if divergence not in DIVERGENCES:
        raise ConfigError(
            f"loss.divergence: {divergence!r} is not known, expected one of "
            f"{', '.join(DIVERGENCES)}"
        )
    if method in SAMPLED and divergence != "forward_kl":
        raise ConfigError(
            f"loss.divergence: {divergence} cannot be computed from {method} targets, which are "
            "unbiased for forward_kl only: set loss.divergence=forward_kl, or generate with "
            "targets.method=topk"
        )
    if ground_truth_residual and divergence != "forward_kl":
        raise ConfigError(
            f"loss.ground_truth_residual: true with loss.divergence={divergence}, expected "
            "forward_kl, which alone weighs the true token by the mass it is given: set "
            "loss.divergence=forward_kl, or loss.ground_truth_residual=false"
        )
    if ground_truth_residual and method in (*SAMPLED, *DENSE):
        raise ConfigError(
            f"loss.ground_truth_residual: true with {method} targets, which leave nothing out that "
            "could be the true token's: set loss.ground_truth_residual=false, or "
            "targets.method=topk"
        )
    if method in SAMPLED and kd_temperature != made_at:
        raise ConfigError(
            f"loss.temperature: {kd_temperature} differs from the targets' temperature "
            f"{made_at}, the only one {method} targets can serve: set loss.temperature={made_at}, "
            f"or generate with targets.temperature={kd_temperature}"
        )


def divergence_name(divergence: str, *, kd_temperature: str, made_at: float, coarse: bool) -> str:
    """Returns the name. coarse: at another temperature than the targets' own, at any time."""
    if not coarse:
        return divergence if made_at == 1 else f"{divergence} at temperature {made_at:g}"
    return (
        f"coarse {divergence} at temperature {kd_temperature} (over listed ids and tail, put into "
        f"buckets at {made_at:g})"
    )
