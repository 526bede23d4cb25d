"""Targets of a teacher whose tokens are others than the student's: its hidden states.

student/projection.py says what the student makes of them.

Shapes: N positions, S and H the widths of student and teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ProjectedTargets:
    """Targets of a teacher with other tokens for N positions of the student.

    hidden_NH  its last hidden states, where it has read what the student's position has read
    has_N      bool: where there is such a state; the others hold anything finite
    space_NS   the same in the student's space, once the projector has seen them
    """

    hidden_NH: Tensor
    has_N: Tensor
    space_NS: Tensor | None = None

    needs_projector: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.has_N)

    def has_targets(self) -> Tensor:
        """bool [N]."""
        return self.has_N

    def entropy_sum(self, positions_N: Any) -> float:
        return 0.0

    def torch(self, device: Any = "cpu") -> ProjectedTargets:
        """Itself: an online teacher's answers are on their device already."""
        return self

    def through(self, projector: Callable[[Tensor], Tensor]) -> ProjectedTargets:
        """With space_NS, of which the projector, a module, learns."""
        dtype = next(projector.parameters()).dtype  # type: ignore[attr-defined]
        return dataclasses.replace(self, space_NS=projector(self.hidden_NH.to(dtype)))
