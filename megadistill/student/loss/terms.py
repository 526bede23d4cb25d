"""Terms of the loss, one object each: a sum over positions, what it is divided by, and a weight.

    loss = sum over terms of weight * scale * sum / count

Sums and counts are of the whole global batch; a micro-batch has its part of both, and a `LossTerms`
holds them by name. Training, its metrics and its step line go through the terms that a student has
(`Student.terms`) and know none of them by name.

Terms that one pass over the logits gives (row_kernel.py) are listed here. The others stand beside
what they are computed from: features.py, projection.py, model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megadistill.config import LossConfig

Count = float | None  # None: the run has no such positions at all


@dataclass(frozen=True)
class LossTerm:
    """One term.

    name      of its sum in `LossTerms.sums`; `<name>_loss` in metrics.jsonl
    weight    of the loss as it is at a step, see `LossConfig.at`
    count     the positions that its sum is divided by: "kd", those with a label and a target; "ce",
              those with a label. None: the sum over the batch is a mean already
    scale     a factor of the reported value as well: temperature squared, of kd
    reported  whether metrics.jsonl has it
    """

    name: str
    weight: Callable[[LossConfig], float]
    count: str | None = "ce"
    scale: Callable[[LossConfig], float] = lambda loss: 1.0
    reported: bool = True

    def value(self, total: float, counts: Mapping[str, Count], loss: LossConfig) -> float | None:
        """The term without its weight, of a sum over the batch; None without any positions."""
        count = 1.0 if self.count is None else counts[self.count]
        return None if count is None else self.scale(loss) * total / max(count, 1)


KD = LossTerm("kd", lambda loss: loss.kd_weight, count="kd", scale=lambda loss: loss.temperature**2)
CE = LossTerm("ce", lambda loss: loss.ce_weight)
Z = LossTerm("z", lambda loss: loss.z_loss, reported=False)


class LossTerms(NamedTuple):
    """A loss and what it is made of. Sums are detached and carry neither weights nor T squared."""

    loss: torch.Tensor  # scalar, differentiable
    sums: dict[str, torch.Tensor]  # scalars, float64, by the name of the term
    kd_count: int  # positions with a label and a target
    ce_count: int  # positions with a label
    agreed: torch.Tensor  # int64; of kd_count, those whose most probable id is the first teacher's
    calibration_M3: torch.Tensor  # float64; the bins of calibration.py, zeros unless asked for

    @property
    def kd_sum(self) -> torch.Tensor:
        return self.sums[KD.name]

    @property
    def ce_sum(self) -> torch.Tensor:
        return self.sums[CE.name]

    def plus(self, name: str, total: torch.Tensor, weight: float) -> LossTerms:
        """With one more term. total: differentiable; weight: already divided by the count."""
        sums = self.sums | {name: total.detach().double()}
        return self._replace(loss=self.loss + weight * total, sums=sums)


def report(
    terms: Iterable[LossTerm],
    totals: Mapping[str, float],
    counts: Mapping[str, Count],
    loss: LossConfig,
) -> dict[str, float | None]:
    """The losses of a step for metrics.jsonl: their weighted sum, then `<name>_loss` of each.

    totals, counts: over the global batch.
    """
    whole, values = 0.0, dict[str, float | None]()
    for term in terms:
        value = term.value(totals[term.name], counts, loss)
        whole += term.weight(loss) * (value or 0.0)
        if term.reported:
            values[f"{term.name}_loss"] = value
    return {"loss": whole, **values}


def kl_of_step(
    loss: LossConfig, totals: Mapping[str, float], entropy: float, count: float
) -> dict[str, float]:
    """`kl`: KL(teacher || student) of a step, nats a position; empty where it is not known.

    From sampled targets kd is the cross-entropy, KL plus the teacher's entropy. What is left is an
    unbiased estimate, which may be negative. Of other divergences than forward_kl it is no KL.
    entropy: of the teacher over `count` positions; 0 where kd is a KL already, nan where a target
    carries no entropy.
    """
    if loss.divergence != "forward_kl" or not count or math.isnan(entropy):
        return {}
    return {"kl": (totals[KD.name] - entropy) / count}
