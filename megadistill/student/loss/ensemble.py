"""Several teachers of the same positions: the targets of each, and its share of the loss.

The distillation term is the sum of share * divergence(a teacher's targets, the student), not the
divergence from a mixture: that is exact for every method and every divergence, of sampled entries
and of whole distributions alike, and the head's three matrix products are made once. For forward KL
both have the same gradient, since it is linear in the teacher's probabilities.

Shapes: N positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megadistill.student.loss.ragged_targets import take_rows
from megadistill.targets import SparseTargets
from megadistill.teacher.dense import DenseTargets

Member = SparseTargets | DenseTargets


@dataclass(frozen=True)
class Ensemble:
    """Targets of several teachers for the same N positions.

    members  the targets of each; of any method and temperature, at the same positions
    shares   of each in the distillation term; they sum to 1, so that kd_weight keeps its meaning
    apart    the members are of different positions, as of caches that are mixed: each position is
             one member's alone, and every share is 1
    """

    members: tuple[Member, ...]
    shares: tuple[float, ...]
    apart: bool = False

    def __post_init__(self) -> None:
        if not self.members or len(self.members) != len(self.shares):
            raise ValueError(
                f"{len(self.members)} teachers and {len(self.shares)} shares, expected equally "
                "many, at least one"
            )
        if self.apart:
            if set(self.shares) != {1.0}:
                raise ValueError(f"shares are {self.shares}, expected 1 for each")
        elif min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares are {self.shares}, expected none below 0 and a sum of 1")
        lengths = [len(member) for member in self.members]
        if len(set(lengths)) > 1:
            raise ValueError(f"targets of {lengths} positions, expected equally many")

    @classmethod
    def of(cls, members: Sequence[Member], weights: Sequence[float]) -> Ensemble:
        """Shares are the weights divided by their sum."""
        total = sum(weights)
        return cls(tuple(members), tuple(weight / total for weight in weights))

    @classmethod
    def of_parts(cls, members: Sequence[Member]) -> Ensemble:
        """Members of which each has the targets of positions that no other has."""
        return cls(tuple(members), (1.0,) * len(members), apart=True)

    def __len__(self) -> int:
        return len(self.members[0])

    def rows(self, start: int, stop: int) -> Ensemble:
        """Positions start to stop."""
        return replace(self, members=tuple(m.rows(start, stop) for m in self.members))

    def take(self, rows: torch.Tensor) -> Ensemble:
        """The positions that `rows`, int64, picks."""
        return replace(self, members=tuple(_taken(m, rows) for m in self.members))

    def torch(self, device: Any = "cpu") -> Ensemble:
        """The same on `device`; what an online teacher gave is there already."""
        return replace(
            self,
            members=tuple(
                m.torch(device) if isinstance(m, SparseTargets) else m for m in self.members
            ),
        )


Targets = Member | Ensemble


def members_of(targets: Targets | None) -> tuple[tuple[Member, float], ...]:
    """(targets, share) of each teacher: of a single one its own and 1, and nothing of None."""
    if targets is None:
        return ()
    if isinstance(targets, Ensemble):
        return tuple(zip(targets.members, targets.shares, strict=True))
    return ((targets, 1.0),)


def take(targets: Targets, rows: torch.Tensor) -> Targets:
    """The positions that `rows`, int64, picks."""
    return targets.take(rows) if isinstance(targets, Ensemble) else _taken(targets, rows)


def _taken(member: Member, rows: torch.Tensor) -> Member:
    return take_rows(member, rows) if isinstance(member, SparseTargets) else member.take(rows)


def count_positions(targets: Targets | None) -> int:
    """Positions that have targets. ValueError where they are others for another teacher."""
    if targets is None:
        return 0
    if isinstance(targets, Ensemble) and targets.apart:
        return int(has_targets(targets).sum())
    (first, _), *others = members_of(targets)
    for number, (other, _) in enumerate(others, 1):
        if not needs_count(first) and not needs_count(other):
            continue  # both have all
        wrong = int((has_targets(first) != has_targets(other)).sum())
        if wrong:
            raise ValueError(
                f"teacher {number} has targets where the first has none, or none where it has "
                f"some, at {wrong} of {len(first)} positions: expected the same positions of all"
            )
    return int(has_targets(first).sum()) if needs_count(first) else len(first)


def needs_count(member: Member) -> bool:
    """Whether some positions may have no target, for which an accelerator has to be asked."""
    return isinstance(member, SparseTargets) or member.has_N is not None


def has_targets(targets: Targets) -> Any:
    """bool [N]: the positions that have targets; of an ensemble those of its first teacher."""
    if isinstance(targets, Ensemble) and targets.apart:
        return sum(has_targets(member) for member in targets.members) > 0
    (first, _), *_ = members_of(targets)
    if isinstance(first, SparseTargets):
        return first.counts > 0
    if first.has_N is not None:
        return first.has_N
    return torch.ones(len(first), dtype=torch.bool, device=first.hidden_NH.device)
