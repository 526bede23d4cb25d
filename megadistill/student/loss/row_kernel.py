"""From a chunk of logits and its sparse targets to losses and the logits' gradient, in place.

One pass serves all terms: the divergence from the teacher's targets, the cross-entropy of the true
tokens, and the z-loss. Sampled targets (varopt, multinomial) are estimates of single probabilities,
so their forward KL is trained as the cross-entropy sum(w * -log q), unbiased. topk and topp are
compared as distributions over k + 1 buckets, the listed ids and the tail as one.

The tail's log-mass is a log-sum-exp over the unlisted ids of its own, never log(1 - listed), which
is the log of zero or less in 16 to 52 % of peaked float32 rows.

Every divergence over buckets has a gradient of one form. With s_i its slope by log q_i and S their
sum: s_i - q_i S for a listed id, and (s_tail - q_tail S) u_v for an unlisted one, u the softmax
over unlisted ids. So a row's gradient is a multiple of u, which is computed in the buffer against
the unlisted maximum and neither overflows nor vanishes however small the student's tail is, with a
few cells put in.

Shapes: C positions of a chunk, V vocabulary, E entries of the chunk, K entries of its longest row,
B = K + 1 buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megadistill.student.loss.divergences import Buckets, ChosenDivergence
from megadistill.student.loss.divergences.kl import FORWARD_KL
from megadistill.student.loss.softmax import Norm, softmax_scale, softmax_stats
from megadistill.targets import SparseTargets

_FORWARD_KL = ChosenDivergence(FORWARD_KL, {})


@dataclass(frozen=True)
class Entries:
    """The listed (id, weight) pairs of a chunk's rows, and where they lie."""

    row_E: torch.Tensor  # int64
    id_E: torch.Tensor  # int64
    slot_E: torch.Tensor  # int64; the entry's place in its own row
    weight_E: torch.Tensor  # the logits' dtype
    tail_C: torch.Tensor  # the logits' dtype
    listed_C: torch.Tensor  # int64; entries of each row
    width: int  # K
    sampled: bool

    @classmethod
    def of(cls, targets: SparseTargets, dtype: torch.dtype) -> Entries:
        counts = targets.counts
        rows = torch.arange(len(counts), device=counts.device)
        row_E = torch.repeat_interleave(rows, counts, output_size=len(targets.ids))
        slot_E = torch.arange(len(targets.ids), device=counts.device) - targets.offsets[row_E]
        return cls(
            row_E,
            targets.ids,
            slot_E,
            targets.weights.to(dtype),
            targets.tail.to(dtype),
            counts,
            int(counts.max()) if len(counts) else 0,
            targets.is_sampled,
        )

    def table(self, value_E: torch.Tensor, fill: float) -> torch.Tensor:
        """[C, K]: a row's values side by side. Sums over it do not depend on scheduling."""
        table_CK = value_E.new_full((len(self.listed_C), self.width), fill)
        table_CK[self.row_E, self.slot_E] = value_E
        return table_CK

    def top_id(self) -> torch.Tensor:
        """int64 [C]: each row's id of the largest weight; -1 for an empty row."""
        if not self.width:
            return torch.full_like(self.listed_C, -1)
        slot_C = self.table(self.weight_E, -1.0).argmax(1)
        return self.table(self.id_E, -1).gather(1, slot_C[:, None])[:, 0]

    def sum(self, value_E: torch.Tensor) -> torch.Tensor:
        return self.table(value_E, 0.0).sum(1)


@dataclass(frozen=True)
class Terms:
    """The terms of a loss, and what turns a row's gradient into the loss's: weights / normalizers.

    kd already holds temperature squared. made_at: the targets' own temperature; another one is
    served by softening both sides' buckets, the coarse divergence.
    """

    kd: float
    ce: float
    z: float = 0.0
    temperature: float = 1.0
    made_at: float = 1.0
    label_smoothing: float = 0.0
    divergence: ChosenDivergence = _FORWARD_KL

    def hard(self, norm: Norm) -> torch.Tensor:
        """[C]: what the softmax at temperature 1 is multiplied by."""
        return self.ce + 2 * self.z * norm.logsumexp_C


@dataclass(frozen=True)
class RowLosses:
    """[C] each, neither scaled nor weighted."""

    kd: torch.Tensor
    ce: torch.Tensor
    z: torch.Tensor  # the squared log-sum-exp
    top_prob: torch.Tensor  # the largest probability, at temperature 1


def distill_rows(
    z_CV: torch.Tensor,
    entries: Entries | None,
    labels_C: torch.Tensor,
    terms: Terms,
    *,
    scratch_CV: torch.Tensor | None = None,
) -> RowLosses:
    """Each row's divergence, cross-entropy, z-loss and largest probability.

    z_CV: logits, float32 or float64, overwritten with the gradient of
    terms.kd * kd.sum() + terms.ce * ce.sum() + terms.z * z.sum(). scratch_CV: the same shape,
    needed for targets of another temperature than 1, since the terms then need a softmax each.
    """
    smoothing, vocab = terms.label_smoothing, z_CV.shape[1]
    truth_C = z_CV.gather(1, labels_C[:, None])[:, 0]
    mean_C = z_CV.mean(1) if smoothing else truth_C

    # z is [C, V], up to 256 MiB: reading and writing it is most of the cost of this function, so
    # every branch goes through it as often as its number of softmaxes needs, and all else is [C]
    # or [E]. Nothing here asks a value of the device: the host only queues work.
    if entries is None:
        norm = softmax_stats(z_CV)
        kd_C = torch.zeros_like(truth_C)
        softmax_scale(z_CV, norm, terms.hard(norm))
    elif terms.made_at == 1:
        kd_C, norm = _distil(z_CV, entries, terms, terms.kd, hard=True)
    else:
        # Two softmaxes of one row, at T and at 1, cannot share a buffer: one more [C, V], 5 passes.
        assert scratch_CV is not None
        norm = softmax_stats(scratch_CV.copy_(z_CV))
        softmax_scale(scratch_CV, norm, terms.hard(norm))
        z_CV.div_(terms.made_at)
        kd_C, _ = _distil(z_CV, entries, terms, terms.kd / terms.made_at, hard=False)
        z_CV.add_(scratch_CV)

    if terms.ce:
        if smoothing:
            # The smoothed label has mass at every id, so its gradient is one more pass.
            z_CV.sub_(terms.ce * smoothing / vocab)
        correction_C1 = torch.full_like(truth_C, -terms.ce * (1 - smoothing))[:, None]
        z_CV.scatter_add_(1, labels_C[:, None], correction_C1)
    log_q_C = (1 - smoothing) * norm.log_prob(truth_C)
    if smoothing:
        log_q_C += smoothing * norm.log_prob(mean_C)
    # The maximum counts 1 in the total.
    return RowLosses(kd_C, -log_q_C, norm.logsumexp_C.square(), norm.total_C.reciprocal())


def _distil(
    z_CV: torch.Tensor, entries: Entries, terms: Terms, kd: float, *, hard: bool
) -> tuple[torch.Tensor, Norm]:
    """The divergence by row, and the norm of all ids; z becomes its gradient times kd.

    hard: the softmax of the hard terms is this one and is added; otherwise it is not.
    """
    if entries.sampled:
        return _sampled(z_CV, entries, terms, kd, hard=hard)
    cells = (entries.row_E, entries.id_E)
    # Listed logits move to a table of [C, K], some kB, and leave -inf, so that the pass over V
    # below gives the tail's own log-sum-exp in nats, at no further cost.
    z_CK = entries.table(z_CV[cells], -torch.inf)
    z_CV[cells] = -torch.inf
    unlisted = softmax_stats(z_CV)
    # Relative to the row's maximum, where float32 is finest.
    top_C = torch.maximum(unlisted.top_C, z_CK.amax(1)) if entries.width else unlisted.top_C
    tail_C = (unlisted.top_C - top_C) + unlisted.total_C.log()
    z_CB = torch.cat([z_CK - top_C[:, None], tail_C[:, None]], 1)
    norm = Norm(top_C, z_CB.exp().sum(1))
    # Without unlisted ids there is no tail, and what rounding left in it has nowhere to go.
    p_tail_C = torch.where(entries.listed_C == z_CV.shape[1], 0.0, entries.tail_C)
    p_CB = torch.cat([entries.table(entries.weight_E, 0.0), p_tail_C[:, None]], 1)
    # From here on all is [C, B], B some dozens: what a divergence does costs next to nothing.
    student = Buckets.of(p_CB, z_CB - norm.total_C.log()[:, None])
    power = terms.made_at / terms.temperature
    compared = student if power == 1 else student.softened(power)

    value_CB, slope_CB = terms.divergence.terms(compared)
    # Through the softmax. 1 / T of `softened` is power, by the chain rule; another 1 / T is in kd.
    gradient_CB = slope_CB - compared.q * slope_CB.sum(1, keepdim=True)
    has_targets_C1 = entries.listed_C[:, None] > 0
    gradient_CB = torch.where(has_targets_C1, kd * power * gradient_CB, 0.0)
    if hard:
        gradient_CB = gradient_CB + terms.hard(norm)[:, None] * student.q
    softmax_scale(z_CV, unlisted, gradient_CB[:, -1])
    z_CV[cells] = gradient_CB[entries.row_E, entries.slot_E]
    return torch.where(has_targets_C1, value_CB, 0.0).sum(1), norm


def _sampled(
    z_CV: torch.Tensor, entries: Entries, terms: Terms, kd: float, *, hard: bool
) -> tuple[torch.Tensor, Norm]:
    cells, weight_E = (entries.row_E, entries.id_E), entries.weight_E
    z_E = z_CV[cells]
    norm = softmax_stats(z_CV)
    log_q_E = z_E - norm.top_C[entries.row_E] - norm.total_C.log()[entries.row_E]
    kd_C = -entries.sum(torch.where(weight_E > 0, weight_E * log_q_E, 0.0))
    # kd * (sum(w) softmax - w): weights of a row sum to 1 as drawn, and to nearly 1 as decoded.
    softmax_C = kd * entries.sum(weight_E)
    if hard:
        softmax_C = softmax_C + terms.hard(norm)
    softmax_scale(z_CV, norm, softmax_C)
    z_CV[cells] = z_CV[cells] - kd * weight_E
    return kd_C, norm
