"""The protocol that all kinds of targets share, so that whoever uses them need not tell them apart.

    SparseTargets     listed entries of each position             sparse targets of every method
    DenseTargets      whole distributions, as the teacher's hidden states and its head
    ProjectedTargets  hidden states of a teacher with other tokens, read by the student's head
    Ensemble          several of the first two, each with a share

Shapes: N positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from megadistill.targets import SparseTargets
    from megadistill.targets.dense import DenseTargets

Array = Any  # np.ndarray or torch.Tensor


class AnyTargets(Protocol):
    """Targets of N positions, of any kind."""

    @property
    def needs_projector(self) -> bool:
        """Whether the student's projector has to read them first, see `ProjectedTargets`."""

    def __len__(self) -> int: ...

    def torch(self, device: Any = "cpu") -> AnyTargets:
        """The same as torch tensors on `device`; what an online teacher gave is there already."""

    def has_targets(self) -> Array:
        """bool [N]: the positions that have a target."""

    def entropy_sum(self, positions_N: Array) -> float:
        """Nats to take from the distillation term of these positions to have a KL.

        0 where it is a KL already, nan where the teacher's entropy is not known. positions_N: bool.
        """


class Targets(AnyTargets, Protocol):
    """Targets that the head compares the student with: those of one teacher, or of several."""

    @property
    def members(self) -> tuple[tuple[Member, float], ...]:
        """Returns (targets, share) of each teacher; of a single one its own and 1."""

    def take(self, rows: Any) -> Targets:
        """The positions that `rows`, an int64 tensor, picks."""

    def torch(self, device: Any = "cpu") -> Targets: ...

    def count_targets(self) -> int:
        """The number of positions that have a target. ValueError where teachers disagree."""


class Member(Targets, Protocol):
    """Targets of one teacher. Exactly one of `listed` and `dense` is not None."""

    @property
    def method(self) -> str:
        """The name of the method in a configuration."""

    @property
    def listed(self) -> SparseTargets | None:
        """The targets, where they are lists of entries."""

    @property
    def dense(self) -> DenseTargets | None:
        """The targets, where they are whole distributions."""

    @property
    def all_have_targets(self) -> bool:
        """Whether each position surely has one. Where not, an accelerator has to be asked."""

    def rows(self, start: int, stop: int) -> Member:
        """Positions start to stop."""

    def take(self, rows: Any) -> Member: ...

    def torch(self, device: Any = "cpu") -> Member: ...
