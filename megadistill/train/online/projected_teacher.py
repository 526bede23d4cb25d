"""A teacher with another tokenizer: its input tokens, and the initial projector.

    the student's tokens -> the same text in the teacher's -> its hidden states, at the student's
    positions that have read the same -> projector -> the student's own head (student/projection.py)

Shapes: B sequences, T the student's positions, U the teacher's, N = B*T, H the teacher's width, S
the student's, V shared tokens.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from megadistill.config import Config
from megadistill.data.alignment import Alignment
from megadistill.data.token_bytes import token_bytes
from megadistill.data.tokenizer import count_ids, load_tokenizer, open_tokenizer, tokenizer_identity
from megadistill.errors import TeacherError
from megadistill.parallel import Mesh
from megadistill.student.model import Student
from megadistill.student.projection import initial_projection, projection_sums
from megadistill.targets.projected import ProjectedTargets
from megadistill.teacher.engine import Teacher


class Tokenizers:
    """The data's tokenizer, which is the student's, and the teacher's own.

    ConfigError where one is missing, and from `alignment` where they cannot be aligned.
    """

    def __init__(self, config: Config) -> None:
        teacher = config.teacher
        self.student = load_tokenizer(config)
        self.teacher = open_tokenizer(
            teacher.model,
            key="teacher.model",
            revision=teacher.revision,
            trust_remote_code=teacher.trust_remote_code,
        )
        ours, theirs = (
            tokenizer_identity(each)["content"] for each in (self.student, self.teacher)
        )
        self.same, self.teacher_content = ours == theirs, theirs

    @functools.cached_property
    def alignment(self) -> Alignment | None:
        """None if both are one tokenizer. Built at first use, in half a second."""
        return None if self.same else Alignment(self.student, self.teacher)

    @property
    def teacher_ids(self) -> int:
        """Number of ids that the teacher has tokens for."""
        return count_ids(self.teacher)

    def read(
        self,
        tokens_BT: np.ndarray,
        documents: list[np.ndarray],
        padding_B: np.ndarray,
        *,
        longest: int | None,
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """(tokens_BU, starts of pieces, rows_N), see `data.alignment.Aligned`.

        longest: positions that the teacher was made for. TeacherError for a piece that has more.
        """
        if self.alignment is None:
            return tokens_BT, documents, np.arange(tokens_BT.size)
        aligned = self.alignment.align(tokens_BT, documents, padding_B)
        if longest is not None and aligned.longest > longest:
            raise TeacherError(
                f"teacher.model: a document of a sequence takes {aligned.longest} of the teacher's "
                f"tokens, expected at most {longest}, its max_position_embeddings: make "
                "data.seq_len smaller"
            )
        return aligned.tokens_BU, aligned.documents, aligned.rows_N

    def shared(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [V] each: the ids of student and teacher that stand for the same bytes."""
        if self.same:
            ids_V = np.arange(self.teacher_ids)
            return ids_V, ids_V
        lost = b"\xff\xff"  # which no token is
        ours, theirs = (
            {
                data: i
                for i, data in reversed(list(enumerate(token_bytes(each, key=key, lost=lost))))
                if data not in (b"", lost)
            }
            for each, key in ((self.student, "data.tokenizer"), (self.teacher, "teacher.model"))
        )
        both = [(i, theirs[data]) for data, i in ours.items() if data in theirs]
        student_V, teacher_V = np.array(sorted(both), np.int64).reshape(-1, 2).T
        return student_V, teacher_V


def projected(hidden_MH: torch.Tensor, rows_N: np.ndarray) -> ProjectedTargets:
    """Returns targets for N positions from the teacher's hidden states. rows_N: -1 for none."""
    rows = torch.as_tensor(rows_N, device=hidden_MH.device)
    return ProjectedTargets(hidden_MH[rows.clamp_min(0)], rows >= 0)


@torch.no_grad()
def begin_projection(
    student: Student, teacher: Teacher, tokenizers: Tokenizers, mesh: Mesh
) -> None:
    """Sets the initial projector, see `student.projection`. Collective.

    Each rank sums the shared tokens of its own slice of the teacher's head.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    assert student.projector is not None
    head, device = teacher.head, mesh.device
    ours_V, theirs_V = (torch.as_tensor(ids, device=device) for ids in tokenizers.shared())
    theirs_V = theirs_V - head.vocabulary.first
    here_V = (theirs_V >= 0) & (theirs_V < head.vocabulary.size)
    with deepspeed.zero.GatheredParameters([student.head.weight]):
        sums = projection_sums(
            student.head.weight[ours_V[here_V]], head.weight_VH[theirs_V[here_V]]
        )
    if head.vocabulary.group is not None:
        sums = mesh.sum(sums, group=head.vocabulary.group)
    # One rank's, so that nothing hangs on how another rounds.
    initial_SH = mesh.broadcast(initial_projection(sums).cpu()).to(device)
    weight = student.projector.weight
    safe_set_full_fp32_param(weight, initial_SH)
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        weight.copy_(initial_SH)
