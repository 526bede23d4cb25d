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
from typing import Any, ClassVar

from megadistill.targets.kinds import Array, Member


@dataclass(frozen=True)
class Ensemble:
    """Targets of several teachers for the same N positions.

    teachers  the targets of each; of any method and temperature, at the same positions
    shares    of each in the distillation term; they sum to 1, so that kd_weight keeps its meaning
    apart     the teachers are of different positions, as of caches that are mixed: each position is
              one teacher's alone, and every share is 1
    """

    teachers: tuple[Member, ...]
    shares: tuple[float, ...]
    apart: bool = False

    needs_projector: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.teachers or len(self.teachers) != len(self.shares):
            raise ValueError(
                f"{len(self.teachers)} teachers and {len(self.shares)} shares, expected equally "
                "many, at least one"
            )
        if self.apart:
            if set(self.shares) != {1.0}:
                raise ValueError(f"shares are {self.shares}, expected 1 for each")
        elif min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares are {self.shares}, expected none below 0 and a sum of 1")
        lengths = [len(teacher) for teacher in self.teachers]
        if len(set(lengths)) > 1:
            raise ValueError(f"targets of {lengths} positions, expected equally many")

    @classmethod
    def of(cls, teachers: Sequence[Member], weights: Sequence[float]) -> Ensemble:
        """Shares are the weights divided by their sum."""
        total = sum(weights)
        return cls(tuple(teachers), tuple(weight / total for weight in weights))

    @classmethod
    def of_parts(cls, teachers: Sequence[Member]) -> Ensemble:
        """Teachers of which each has the targets of positions that no other has."""
        return cls(tuple(teachers), (1.0,) * len(teachers), apart=True)

    def __len__(self) -> int:
        return len(self.teachers[0])

    @property
    def members(self) -> tuple[tuple[Member, float], ...]:
        """Returns (targets, share) of each teacher."""
        return tuple(zip(self.teachers, self.shares, strict=True))

    def take(self, rows: Any) -> Ensemble:
        """The positions that `rows`, int64, picks."""
        return replace(self, teachers=tuple(t.take(rows) for t in self.teachers))

    def torch(self, device: Any = "cpu") -> Ensemble:
        """The same on `device`."""
        return replace(self, teachers=tuple(t.torch(device) for t in self.teachers))

    def has_targets(self) -> Array:
        """bool [N]: of teachers that share all positions, the first one's."""
        if self.apart:
            return sum(teacher.has_targets() for teacher in self.teachers) > 0
        return self.teachers[0].has_targets()

    def count_targets(self) -> int:
        """Positions with targets. ValueError where they are others for another teacher."""
        if self.apart:
            return int(self.has_targets().sum())
        first, *others = self.teachers
        for number, other in enumerate(others, 1):
            if first.all_have_targets and other.all_have_targets:
                continue
            wrong = int((first.has_targets() != other.has_targets()).sum())
            if wrong:
                raise ValueError(
                    f"teacher {number} has targets where the first has none, or none where it has "
                    f"some, at {wrong} of {len(first)} positions: expected the same positions of "
                    "all"
                )
        return first.count_targets()

    def entropy_sum(self, positions_N: Array) -> float:
        """Sums each teacher's, times its share."""
        return sum(share * each.entropy_sum(positions_N) for each, share in self.members)
