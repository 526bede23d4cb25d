"""The loss over the union of both sides' most probable ids against others, on given logits.

whole   KL(teacher || student) over the vocabulary as anyone writes it: log_softmax of both sides,
        F.kl_div, autograd
listed  the same union and its tail by autograd: log_softmax of both sides, gather, KL

All end with the gradient of the student's logits. Given logits are what a training step has in a
chunk's buffer; the three matrix products that make and use them are the same for all, and left out.

Found on two quiet cores, 256 positions, V = 152,000, 15 rounds: whole takes 4.6 times the time of
ours with 64 ids of each side (3.7 to 5.0), 6.5 with 8 (4.8 to 8.0); listed 2.8 and 4.3.

Shapes: C positions, V vocabulary, M = 2 * K ids.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from megadistill.student.dense import union_entries
from megadistill.student.rows import Terms, distill_rows


@dataclass(frozen=True)
class SubsetSizes:
    """Of a chunk; entries: K of each side."""

    positions: int = 256
    vocab: int = 152_000
    entries: int = 64


def subset_cost(sizes: SubsetSizes, *, rounds: int) -> dict[str, Any]:
    """Medians of `rounds` rounds in which the three take turns, in seconds and as ratios."""
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.positions, sizes.vocab)
    student_CV = 3 * torch.randn(shape, generator=generator)
    teacher_CV = student_CV + torch.randn(shape, generator=generator)
    k = sizes.entries
    # Ours overwrites what it is given, so it gets copies, made beforehand in the same memory.
    ours_CV, theirs_CV = torch.empty_like(student_CV), torch.empty_like(teacher_CV)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "union": lambda: union(ours_CV, theirs_CV, k),
        "whole": lambda: whole(student_CV, teacher_CV),
        "listed": lambda: listed(student_CV, teacher_CV, k),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, rounds):  # the first warms up
        for name, way in ways.items():
            ours_CV.copy_(student_CV)
            theirs_CV.copy_(teacher_CV)
            started = time.perf_counter()
            way()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    row: dict[str, Any] = {
        "data": f"{sizes.positions} positions, V {sizes.vocab:,}, {k} ids of each side",
        "rounds": rounds, "union_s": statistics.median(seconds["union"]),
    }  # fmt: skip
    for name in ("whole", "listed"):
        ratios = [a / b for a, b in zip(seconds[name], seconds["union"], strict=True)]
        row[f"{name}_s"] = statistics.median(seconds[name])
        row[f"{name}_over_union"] = statistics.median(ratios)
        row[f"{name}_least"], row[f"{name}_most"] = min(ratios), max(ratios)
    return row


def union(student_CV: torch.Tensor, teacher_CV: torch.Tensor, k: int) -> torch.Tensor:
    """Our gradient of the student's logits; both are overwritten."""
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
