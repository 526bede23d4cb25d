"""Whole distributions, kept as what they are made of: the teacher's hidden states, and its head.

For a student with an online teacher. A position costs the teacher's width instead of its
vocabulary; the distributions are made a chunk at a time where the student's logits of the same
chunk are (student/loss/fused.py), so that neither side's [N, V] ever exists.

Shapes: N positions, C of a chunk, H the teacher's hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from megadistill.teacher.chunked_head import TeacherHead


@dataclass(frozen=True)
class DenseTargets:
    """Targets of N positions from the teacher's full distributions.

    hidden_NH  its last hidden states, in its own dtype
    head       its output projection, of the whole vocabulary, on the device of hidden_NH
    k          None: whole distributions are compared. Else those over the k most probable ids of
               the teacher and the k of the student, and what is left as one bucket (`union`)
    has_N      bool: the positions that have a target; None where all have
    """

    hidden_NH: torch.Tensor
    head: TeacherHead
    k: int | None = None
    has_N: torch.Tensor | None = None

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
    def vocab_size(self) -> int:
        return self.head.vocabulary.size

    def rows(self, start: int, stop: int) -> DenseTargets:
        """Positions start to stop."""
        return self.take(slice(start, stop))

    def take(self, rows: Any) -> DenseTargets:
        """The positions that `rows` picks, a slice or an index tensor."""
        has_N = None if self.has_N is None else self.has_N[rows]
        return dataclasses.replace(self, hidden_NH=self.hidden_NH[rows], has_N=has_N)

    def log_probs(self, *, temperature: float, out_CV: torch.Tensor) -> torch.Tensor:
        """Write the log-probabilities of all positions; ids that the teacher lacks get -inf."""
        ours_CV, others_CV = out_CV.split([self.vocab_size, out_CV.shape[1] - self.vocab_size], 1)
        others_CV.fill_(-torch.inf)
        # All at once: in the head's own chunks, of 13 rows at 152,000 ids on a CPU, reading its
        # weight is most of the time.
        narrow_CV = ours_CV.float()  # itself, but for a student in float64
        ours_CV.copy_(
            self.head.log_probs(self.hidden_NH, temperature=temperature, out_CV=narrow_CV)
        )
        return out_CV
