"""The divergence from a teacher's whole distribution, or over what both sides find most probable.

exact  every id is a bucket of its own. The gradient of a row's logits is slope - q * sum(slope), as
       in row_kernel.py, without a tail
union  the k most probable ids of the teacher and the k of the student, each once, and the rest as
       one bucket, which `rows.distill_rows` compares ("subset distillation"). An id that both have
       is one bucket: counted twice, its mass would be added twice, and the two distributions over
       the list would not sum to 1

Shapes: C positions of a chunk, V vocabulary, K ids of one side, M = 2 * K, E entries of the chunk,
W columns of a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from megadistill.student.loss.divergences import Buckets, ChosenDivergence
from megadistill.student.loss.row_kernel import Entries, RowLosses, Terms, distill_rows
from megadistill.student.loss.softmax import softmax_stats
from megadistill.targets.distributions import columns_near_the_top

TILE = {False: 2**17, True: 2**24}  # elements, on a CPU and on a GPU


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

    z_CV: logits, overwritten with the gradient; log_p_CV and scratch_CV, of the same shape, are
    overwritten. has_C: bool, the rows that the teacher has said anything of; by default all.
    """
    kd = terms.kd / terms.temperature
    soft_CV = z_CV if terms.temperature == 1 else z_CV / terms.temperature
    torch.log_softmax(soft_CV, 1, out=scratch_CV)
    value_C, total_C = z_CV.new_zeros(2, len(z_CV)).unbind()
    for part in _columns(z_CV, terms.divergence):
        log_p_CW, log_q_CW = log_p_CV[:, part], scratch_CV[:, part]
        buckets = Buckets(log_p_CW.exp(), log_q_CW.exp(), log_p_CW, log_q_CW)
        value_CW, slope_CW = terms.divergence.terms(buckets, has_tail=False)
        value_C += value_CW.sum(1)
        total_C += slope_CW.sum(1)
        log_p_CW.copy_(slope_CW)
        log_q_CW.copy_(buckets.q)
    losses = distill_rows(z_CV, None, labels_C, terms)
    has_C1 = 1.0 if has_C is None else has_C[:, None].to(z_CV.dtype)
    for part in _columns(z_CV, terms.divergence):
        slope_CW = log_p_CV[:, part].addcmul_(scratch_CV[:, part], total_C[:, None], value=-1)
        z_CV[:, part].add_(slope_CW.mul_(has_C1), alpha=kd)
    return dataclasses.replace(losses, kd=value_C if has_C is None else value_C * has_C)


def _columns(z_CV: torch.Tensor, divergence: ChosenDivergence) -> Iterator[slice]:
    """Columns of so few at a time that what is made of them stays in the cache.

    A divergence goes through its rows some thirty times. Some look at a row as a whole.
    """
    C, V = z_CV.shape
    some = V if divergence.kind.whole_rows else max(1, TILE[z_CV.is_cuda] // max(C, 1))
    return (slice(first, min(first + some, V)) for first in range(0, V, some))


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
    tail_C = softmax_stats(teacher_CV).logsumexp_C
    norm_C = torch.logaddexp(score_CM.logsumexp(1), tail_C)
    return Entries(
        row_E,
        id_E,
        slot_CM[first_CM],
        (score_E - norm_C[row_E]).exp(),
        (tail_C - norm_C).exp(),
        listed_C,
        int(listed_C.max()) if C else 0,
        sampled=False,
    )


def _best(values_CV: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [C, k]: the columns of the k largest values of each row, in any order."""
    columns_CM = columns_near_the_top(values_CV, k)
    if columns_CM is None:
        return values_CV.topk(k, 1, sorted=False).indices
    best_CK = values_CV.gather(1, columns_CM).topk(k, 1, sorted=False).indices
    return columns_CM.gather(1, best_CK)
