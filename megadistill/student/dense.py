"""The divergence from a teacher's whole distribution, or over what both sides find most probable.

exact  every id is a bucket of its own. The gradient of a row's logits is slope - q * sum(slope), as
       in rows.py, without a tail
union  the k most probable ids of the teacher and the k of the student, each once, and the rest as
       one bucket, which `rows.distill_rows` compares ("subset distillation"). An id that both have
       is one bucket: counted twice, its mass would be added twice, and the two distributions over
       the list would not sum to 1

Shapes: C positions of a chunk, V vocabulary, K ids of one side, M = 2 * K, E entries of the chunk.
"""

from __future__ import annotations

import dataclasses

import torch

from megadistill.student.divergences import Buckets, divergence_terms
from megadistill.student.rows import Entries, RowLosses, Terms, distill_rows
from megadistill.student.softmax import begin
from megadistill.teacher.distributions import BLOCK


def distill_dense(
    z_CV: torch.Tensor,
    log_p_CV: torch.Tensor,
    labels_C: torch.Tensor,
    terms: Terms,
    *,
    scratch_CV: torch.Tensor,
    has_C: torch.Tensor | None = None,
) -> RowLosses:
    """As `distill_rows`, against log_p_CV, the teacher's log-probabilities at terms.temperature.

    z_CV: logits, overwritten with the gradient; scratch_CV: the same shape. has_C: bool, the rows
    that the teacher has said anything of; by default all.
    """
    losses = distill_rows(scratch_CV.copy_(z_CV), None, labels_C, terms)
    log_q_CV = torch.log_softmax(z_CV / terms.temperature, 1)
    # Divergences keep their last column for a tail, and here is none.
    log_p_CB, log_q_CB = (
        torch.nn.functional.pad(log, (0, 1), value=-torch.inf) for log in (log_p_CV, log_q_CV)
    )
    buckets = Buckets(log_p_CB.exp(), log_q_CB.exp(), log_p_CB, log_q_CB)
    value_CB, slope_CB = divergence_terms(terms.divergence, buckets)
    if has_C is not None:
        value_CB.mul_(has_C[:, None])
        slope_CB.mul_(has_C[:, None])
    sum_C1 = slope_CB.sum(1, keepdim=True)
    gradient_CV = slope_CB[:, :-1].sub_(buckets.q[:, :-1] * sum_C1)
    torch.add(scratch_CV, gradient_CV, alpha=terms.kd / terms.temperature, out=z_CV)
    return dataclasses.replace(losses, kd=value_CB.sum(1))


def union_entries(z_CV: torch.Tensor, teacher_CV: torch.Tensor, k: int) -> Entries:
    """The ids that either side has among its k most probable, with the teacher's probabilities.

    teacher_CV: its logits, or log-probabilities; overwritten.
    """
    C, V = z_CV.shape
    both_CM = torch.cat([_best(side_CV, min(k, V)) for side_CV in (teacher_CV, z_CV)], 1)
    both_CM = both_CM.sort(1).values
    first_CM = torch.ones_like(both_CM, dtype=torch.bool)
    first_CM[:, 1:] = both_CM[:, 1:] != both_CM[:, :-1]
    listed_C, slot_CM = first_CM.sum(1), first_CM.cumsum(1) - 1
    row_E, id_E = first_CM.nonzero()[:, 0], both_CM[first_CM]
    score_E = teacher_CV[row_E, id_E]
    teacher_CV[row_E, id_E] = -torch.inf
    # Each once, and the rest by a log-sum-exp of its own: one minus the listed may be below zero.
    score_CM = torch.full_like(both_CM, -torch.inf, dtype=teacher_CV.dtype)
    score_CM[first_CM] = score_E
    tail_C = begin(teacher_CV).logsumexp_C
    norm_C = torch.logaddexp(score_CM.logsumexp(1), tail_C)
    return Entries(
        row_E, id_E, slot_CM[first_CM], (score_E - norm_C[row_E]).exp(), (tail_C - norm_C).exp(),
        listed_C, int(listed_C.max()) if C else 0, sampled=False,
    )  # fmt: skip


def _best(values_CV: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [C, k]: the columns of the k largest values of each row, in any order.

    They lie in the k blocks whose own maxima are largest, so that only these are looked into: one
    pass through the row in place of torch.topk's several.
    """
    V = values_CV.shape[1]
    if 2 * k * BLOCK > V:
        return values_CV.topk(k, 1, sorted=False).indices
    whole = V - V % BLOCK
    top_CB = values_CV[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)
    blocks_CK = top_CB.topk(k, 1, sorted=False).indices
    columns_V = torch.arange(V, device=values_CV.device)
    inside_CM = (blocks_CK[:, :, None] * BLOCK + columns_V[:BLOCK]).flatten(1)
    columns_CM = torch.cat([inside_CM, columns_V[whole:].expand(len(values_CV), -1)], 1)
    best_CK = values_CV.gather(1, columns_CM).topk(k, 1, sorted=False).indices
    return columns_CM.gather(1, best_CK)
