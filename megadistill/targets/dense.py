"""Whole distributions, kept as what they are made of: the teacher's hidden states, and its head.

For a student with an online teacher. A position costs the teacher's width instead of its
vocabulary; the distributions are made a chunk at a time where the student's logits of the same
chunk are (student/loss/fused.py), so that neither side's [N, V] ever exists.

Shapes: N positions, C of a chunk, H the teacher's hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Head(Protocol):
    """The part of `teacher.chunked_head.TeacherHead` that is needed here."""

    vocabulary: Any  # VocabularySlice

    def log_probs(
        self, hidden_CH: Tensor, *, temperature: float = 1.0, out_CV: Tensor | None
    ) -> Tensor:
        """float32 [C, V] log-probabilities, written to out_CV."""


@dataclass(frozen=True)
class DenseTargets:
    """Targets of N positions from the teacher's full distributions.

    hidden_NH  its last hidden states, in its own dtype
    head       its output projection, of the whole vocabulary, on the device of hidden_NH
    k          None: whole distributions are compared. Else those over the k most probable ids of
               the teacher and the k of the student, and what is left as one bucket (`union`)
    has_N      bool: the positions that have a target; None where all have
    """

    hidden_NH: Tensor
    head: Head
    k: int | None = None
    has_N: Tensor | None = None

    needs_projector: ClassVar[bool] = False
    listed: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.head.vocabulary.ranks > 1:
            raise ValueError("the head holds a slice of the vocabulary, expected all of it")
        if self.k is not None and self.has_N is not None:
            raise ValueError("a union is of all positions, expected has_N None")

    def __len__(self) -> int:
        return len(self.hidden_NH)

    @property
    def method(self) -> str:
        """The word for it in a configuration."""
        return "exact" if self.k is None else "union"

    @property
    def dense(self) -> DenseTargets:
        return self

    @property
    def members(self) -> tuple[tuple[DenseTargets, float], ...]:
        """See `kinds.Targets`."""
        return ((self, 1.0),)

    @property
    def vocab_size(self) -> int:
        return self.head.vocabulary.size

    @property
    def all_have_targets(self) -> bool:
        return self.has_N is None

    def has_targets(self) -> Tensor:
        """bool [N]."""
        import torch

        if self.has_N is not None:
            return self.has_N
        return torch.ones(len(self), dtype=torch.bool, device=self.hidden_NH.device)

    def count_targets(self) -> int:
        return len(self) if self.has_N is None else int(self.has_N.sum())

    def entropy_sum(self, positions_N: Any) -> float:
        return 0.0

    def torch(self, device: Any = "cpu") -> DenseTargets:
        """Itself: an online teacher's answers are on their device already."""
        return self

    def rows(self, start: int, stop: int) -> DenseTargets:
        """Positions start to stop."""
        return self.take(slice(start, stop))

    def take(self, rows: Any) -> DenseTargets:
        """The positions that `rows` picks, a slice or an index tensor."""
        has_N = None if self.has_N is None else self.has_N[rows]
        return dataclasses.replace(self, hidden_NH=self.hidden_NH[rows], has_N=has_N)

    def log_probs(self, *, temperature: float, out_CV: Tensor) -> Tensor:
        """Write the log-probabilities of all positions; ids that the teacher lacks get -inf."""
        ours_CV, others_CV = out_CV.split([self.vocab_size, out_CV.shape[1] - self.vocab_size], 1)
        others_CV.fill_(-math.inf)
        # All at once: in the head's own chunks, of 13 rows at 152,000 ids on a CPU, reading its
        # weight is most of the time.
        narrow_CV = ours_CV.float()  # itself, but for a student in float64
        ours_CV.copy_(
            self.head.log_probs(self.hidden_NH, temperature=temperature, out_CV=narrow_CV)
        )
        return out_CV
