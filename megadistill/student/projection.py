"""The projector: a teacher's hidden states in the student's space, read by the student's own head.

For a teacher whose distributions are over other tokens than the student's. Its last hidden state
and the student's both stand for the continuation of a text that both have read
(data/alignment.py says where). A learned matrix P leads from the teacher's space to the student's,
and softmax(W P t) with W, the student's head, is the teacher's opinion in the student's vocabulary
(dual-space knowledge distillation, arXiv 2406.17328).

Two losses come of it. The student is compared with that opinion, by any divergence; and P learns
to foresee the true next token by W. Neither moves what the other learns: the opinion has no
gradient in the first, W none in the second.

P begins where W P comes nearest to the teacher's own head U on the tokens that both vocabularies
have, in least squares: (W'W) P = W'U. Its rows are the shared tokens' only, so nothing of the size
of the vocabulary times itself, or of positions times the vocabulary, is made: what a position costs
is S x H. The way over the teacher's probabilities, softmax(U t) U, costs twice V x H before it.

Shapes: N positions, S and H the widths of student and teacher, V shared tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from megadistill.student.loss.terms import LossTerm

# The projector's own cross-entropy. Nothing but the projector learns of it, so its weight is 1.
PROJECTOR = LossTerm("projector", lambda loss: 1.0, count="kd")


class Projector(nn.Linear):
    """P: from the teacher's width to the student's."""

    def __init__(self, teacher_width: int, student_width: int) -> None:
        super().__init__(teacher_width, student_width, bias=False)


def projection_sums(
    head_VS: torch.Tensor, teacher_VH: torch.Tensor, *, chunk: int = 8192
) -> torch.Tensor:
    """float64 [S, S + H]: W'W and, beside it, W'U of some tokens, a row of each per token."""
    width = head_VS.shape[1]
    sums = head_VS.new_zeros(width, width + teacher_VH.shape[1], dtype=torch.float64)
    for head_CS, teacher_CH in zip(head_VS.split(chunk), teacher_VH.split(chunk), strict=True):
        head_CS = head_CS.float()
        sums += head_CS.T @ torch.cat([head_CS, teacher_CH.float()], 1)
    return sums


def initial_projection(sums: torch.Tensor) -> torch.Tensor:
    """float32 [S, H]: the P of least squares, of the `projection_sums` of all shared tokens.

    A thousandth of the mean of its diagonal is added to W'W: for fewer tokens than W is wide, and
    for directions that no token uses.
    """
    gram_SS, cross_SH = sums[:, : len(sums)].clone(), sums[:, len(sums) :]
    gram_SS.diagonal().add_(1e-3 * gram_SS.diagonal().mean())
    return torch.linalg.solve(gram_SS, cross_SH).float()
