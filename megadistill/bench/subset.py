"""The loss over the union of both sides' most probable ids against others, on given logits.

whole   KL(teacher || student) over the vocabulary as anyone writes it: log_softmax of both sides,
        F.kl_div, autograd
listed  the same union and its tail by autograd: log_softmax of both sides, gather, KL

These end with the gradient of the student's logits. Given logits are what a training step has in a
chunk's buffer; the matrix products that make and use them are the same for all, and left out. step
is with them: from both sides' hidden states to the gradients of the student's and of its head, the
union through `distillation_terms` and `whole` as anyone writes it.

Found on two quiet cores, V = 152,000, least and most behind:

positions, ids   rounds   whole              listed             step
256, 64          11       4.7 (3.6 to 5.4)   2.9 (2.4 to 3.2)   0.80 (0.78 to 0.85)
256, 8           11       5.9 (5.4 to 8.3)   3.7 (3.3 to 4.7)   0.82 (0.74 to 0.91)
1,024, 64        5        4.2 (4.1 to 4.5)   3.0 (2.7 to 3.0)   1.02 (0.89 to 1.05)

The step's four matrix products are more than nine tenths of it, and the same in both; ours makes
them in chunks, of 64 rows for 256 positions, which is slower, so that [N, V] never exists, of which
the naive step holds several at once.

Shapes: C positions, V vocabulary, M = 2 * K ids.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from megadistill.bench.rounds import ratio, take_turns
from megadistill.student.head import distillation_terms
from megadistill.student.loss.dense_divergence import union_entries
from megadistill.student.loss.row_kernel import Terms, distill_rows
from megadistill.targets.dense import DenseTargets
from megadistill.targets.distributions import VocabularySlice
from megadistill.teacher.chunked_head import TeacherHead


@dataclass(frozen=True)
class SubsetSizes:
    """Sizes of a chunk; entries: K of each side; hidden: of teacher and student."""

    positions: int = 256
    vocab: int = 152_000
    entries: int = 64
    hidden: int = 1024


def subset_cost(sizes: SubsetSizes, *, rounds: int) -> dict[str, Any]:
    """Medians of `rounds` rounds in which all take turns, in seconds and as ratios."""
    given, step = _given_logits(sizes, rounds), _whole_steps(sizes, rounds)
    return {
        "data": f"{sizes.positions} positions, V {sizes.vocab:,}, {sizes.entries} ids of each side",
        "rounds": rounds,
        **{f"{name}_s": statistics.median(seconds) for name, seconds in (given | step).items()},
        **ratio(given["whole"], given["union"], name="whole"),
        **ratio(given["listed"], given["union"], name="listed"),
        **ratio(step["whole_step"], step["union_step"], name="step"),
    }


def _given_logits(sizes: SubsetSizes, rounds: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.positions, sizes.vocab)
    student_CV = 3 * torch.randn(shape, generator=generator)
    teacher_CV = student_CV + torch.randn(shape, generator=generator)
    k = sizes.entries
    # Ours overwrites what it is given, so it gets copies, made beforehand in the same memory.
    ours_CV, theirs_CV = torch.empty_like(student_CV), torch.empty_like(teacher_CV)

    def copy() -> None:
        ours_CV.copy_(student_CV)
        theirs_CV.copy_(teacher_CV)

    ways = {
        "union": lambda: union(ours_CV, theirs_CV, k),
        "whole": lambda: whole(student_CV, teacher_CV),
        "listed": lambda: listed(student_CV, teacher_CV, k),
    }
    return take_turns(ways, rounds=rounds, before=copy)


def _whole_steps(sizes: SubsetSizes, rounds: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    N, H, V = sizes.positions, sizes.hidden, sizes.vocab
    student_NH = torch.randn(N, H, generator=generator).requires_grad_()
    teacher_NH = student_NH.detach() + 0.3 * torch.randn(N, H, generator=generator)
    weight_VH = (3 * H**-0.5 * torch.randn(V, H, generator=generator)).requires_grad_()
    head = TeacherHead(weight_VH.detach().clone(), VocabularySlice(0, V))
    labels_N = torch.zeros(N, dtype=torch.int64)

    def union_step() -> None:
        targets = DenseTargets(teacher_NH, head, sizes.entries)
        distillation_terms(student_NH, weight_VH, targets, labels_N).loss.backward()

    def whole_step() -> None:
        log_p_NV = (teacher_NH @ head.weight_VH.T).log_softmax(1)
        log_q_NV = (student_NH @ weight_VH.T).log_softmax(1)
        functional.kl_div(log_q_NV, log_p_NV, reduction="batchmean", log_target=True).backward()

    def forget() -> None:
        student_NH.grad = weight_VH.grad = None

    ways = {"union_step": union_step, "whole_step": whole_step}
    return take_turns(ways, rounds=rounds, before=forget)


def union(student_CV: torch.Tensor, teacher_CV: torch.Tensor, k: int) -> torch.Tensor:
    """Computes the gradient of the student's logits with our kernels; both are overwritten."""
    entries = union_entries(student_CV, teacher_CV, k)
    labels_C = torch.zeros(len(student_CV), dtype=torch.int64)
    distill_rows(student_CV, entries, labels_C, Terms(kd=1.0, ce=0.0))
    return student_CV


def whole(student_CV: torch.Tensor, teacher_CV: torch.Tensor) -> torch.Tensor:
    """The gradient of the KL over the vocabulary."""
    leaf_CV = student_CV.detach().requires_grad_()
    log_p_CV, log_q_CV = teacher_CV.log_softmax(1), leaf_CV.log_softmax(1)
    functional.kl_div(log_q_CV, log_p_CV, reduction="sum", log_target=True).backward()
    assert leaf_CV.grad is not None
    return leaf_CV.grad


def listed(student_CV: torch.Tensor, teacher_CV: torch.Tensor, k: int) -> torch.Tensor:
    """The gradient of the KL over the union and its tail."""
    leaf_CV = student_CV.detach().requires_grad_()
    log_p_CV, log_q_CV = teacher_CV.log_softmax(1), leaf_CV.log_softmax(1)
    ids_CM = torch.cat([log_p_CV.topk(k, 1).indices, log_q_CV.topk(k, 1).indices], 1).sort(1).values
    twice_CM = torch.zeros_like(ids_CM, dtype=torch.bool)
    twice_CM[:, 1:] = ids_CM[:, 1:] == ids_CM[:, :-1]
    log_p_CM, log_q_CM = (
        side.gather(1, ids_CM).masked_fill(twice_CM, -torch.inf) for side in (log_p_CV, log_q_CV)
    )
    p_tail_C, q_tail_C = (1 - log.exp().sum(1) for log in (log_p_CM, log_q_CM))
    gap_CM = (log_p_CM - log_q_CM).masked_fill(twice_CM, 0)
    loss = (log_p_CM.exp() * gap_CM).sum() + (p_tail_C * (p_tail_C / q_tail_C).log()).sum()
    loss.backward()
    assert leaf_CV.grad is not None
    return leaf_CV.grad
