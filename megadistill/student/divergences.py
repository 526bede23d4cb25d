"""From a chunk of logits and its sparse targets to losses and the logits' gradient, in place.

One pass serves both terms: the divergence from the teacher's targets and the cross-entropy of the
true tokens. Sampled targets (varopt, multinomial) are estimates of single probabilities, so their
forward KL is trained as the cross-entropy sum(w * -log q), unbiased. topk and topp are compared as
distributions over k + 1 symbols, the listed ids and the tail as one bucket.

Two things keep peaked rows right. The tail's log-mass is a log-sum-exp over the unlisted ids of its
own, never log(1 - listed), which is the log of zero or less in 16 to 52 % of peaked float32 rows.
And a divergence is summed by bucket as p * (exp(d) - 1 - d), d = log q - log p, which is KL for
distributions and not negative term by term; nothing is clamped.

The gradient of a tail bucket: for an unlisted id v, P * q_v - p_tail * u_v, with q the softmax, u
the softmax over unlisted ids and P the sum of the p. Both are multiples of u_v, which is computed
against the unlisted maximum, so neither overflows however small the student's tail is.

Shapes: C positions of a chunk, V vocabulary, E entries of the chunk, K entries of its longest row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megadistill.targets import SAMPLED, SparseTargets


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
            row_E, targets.ids, slot_E, targets.weights.to(dtype), targets.tail.to(dtype), counts,
            int(counts.max()) if len(counts) else 0, targets.method in SAMPLED,
        )  # fmt: skip

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

    def logsumexp(self, value_E: torch.Tensor) -> torch.Tensor:
        if not self.width:
            return value_E.new_full((len(self.listed_C),), -torch.inf)
        return self.table(value_E, -torch.inf).logsumexp(1)


@dataclass(frozen=True)
class Scales:
    """What turns a row's gradient into the loss's: weights over normalizers.

    kd already holds temperature squared.
    """

    kd: float
    ce: float
    temperature: float = 1.0
    label_smoothing: float = 0.0


def distill_rows(
    z_CV: torch.Tensor,
    entries: Entries | None,
    labels_C: torch.Tensor,
    scales: Scales,
    *,
    scratch_CV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kd_C, ce_C), each row's divergence and cross-entropy, neither scaled nor weighted.

    z_CV: logits, float32 or float64, overwritten with the gradient of
    scales.kd * kd.sum() + scales.ce * ce.sum(). scratch_CV: the same shape, needed where the
    temperature is not 1, since the two terms then need a softmax each.
    """
    smoothing, vocab = scales.label_smoothing, z_CV.shape[1]
    truth_C = z_CV.gather(1, labels_C[:, None])[:, 0]
    smoothed_C = (1 - smoothing) * truth_C
    if smoothing:
        smoothed_C += smoothing * z_CV.mean(1)

    if entries is None:
        logsumexp_C, total_C = _exponentials(z_CV)
        kd_C = torch.zeros_like(truth_C)
        z_CV.mul_((scales.ce / total_C)[:, None])
    elif scales.temperature == 1:
        kd_C, logsumexp_C = _divergence(z_CV, entries, scales.kd, scales.ce)
    else:
        assert scratch_CV is not None
        logsumexp_C, total_C = _exponentials(scratch_CV.copy_(z_CV))
        z_CV.div_(scales.temperature)
        kd_C, _ = _divergence(z_CV, entries, scales.kd / scales.temperature, 0.0)
        z_CV.addcmul_(scratch_CV, (scales.ce / total_C)[:, None])

    if scales.ce:
        if smoothing:
            z_CV.sub_(scales.ce * smoothing / vocab)
        correction_C1 = torch.full_like(truth_C, -scales.ce * (1 - smoothing))[:, None]
        z_CV.scatter_add_(1, labels_C[:, None], correction_C1)
    return kd_C, logsumexp_C - smoothed_C


def _exponentials(z_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """z becomes exp(z - max); returns (log-sum-exp, sum of the exponentials) by row."""
    top_C = z_CV.amax(1)
    # A row of nothing but -inf (every id is listed) has no maximum to subtract.
    top_C = torch.where(top_C == -torch.inf, 0.0, top_C)
    total_C = z_CV.sub_(top_C[:, None]).exp_().sum(1)
    return top_C + total_C.log(), total_C


def _divergence(
    z_CV: torch.Tensor, entries: Entries, kd: float, ce: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(forward KL or cross-entropy, log-sum-exp) by row; z becomes kd * d(kd_C) + ce * softmax."""
    cells, weight_E = (entries.row_E, entries.id_E), entries.weight_E
    z_E = z_CV[cells]
    listed_C = entries.sum(weight_E)
    if entries.sampled:
        logsumexp_C, total_C = _exponentials(z_CV)
        log_q_E = z_E - logsumexp_C[entries.row_E]
        kd_C = -entries.sum(torch.where(weight_E > 0, weight_E * log_q_E, 0.0))
        z_CV.mul_(((kd * listed_C + ce) / total_C)[:, None])
        z_CV[cells] = z_CV[cells] - kd * weight_E
        return kd_C, logsumexp_C

    # Without unlisted ids there is no tail, and what rounding left in it has nowhere to go.
    tailless_C = (entries.listed_C == 0) | (entries.listed_C == z_CV.shape[1])
    tail_C = torch.where(tailless_C, 0.0, entries.tail_C)
    mass_C = listed_C + tail_C
    z_CV[cells] = -torch.inf
    unlisted_C, total_C = _exponentials(z_CV)
    logsumexp_C = torch.logaddexp(unlisted_C, entries.logsumexp(z_E))
    log_q_E, log_q_tail_C = z_E - logsumexp_C[entries.row_E], unlisted_C - logsumexp_C
    q_E, q_tail_C = log_q_E.exp(), log_q_tail_C.exp()
    kd_C = entries.sum(bucket_kl(weight_E, log_q_E)) + bucket_kl(tail_C, log_q_tail_C)
    kd_C = torch.where(entries.listed_C > 0, kd_C, 0.0)

    unlisted_scale_C = kd * (mass_C * q_tail_C - tail_C) + ce * q_tail_C
    z_CV.mul_(torch.where(total_C > 0, unlisted_scale_C / total_C, 0.0)[:, None])
    z_CV[cells] = kd * (mass_C[entries.row_E] * q_E - weight_E) + ce * q_E
    return kd_C, logsumexp_C


def bucket_kl(p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p * (exp(d) - 1 - d) with d = log q - log p: never negative; q where p is 0.

    Summed over the buckets of two distributions it is KL(p || q).
    """
    d = log_q - p.log()
    series = d * d * (1 / 2 + d / 6 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7)))))
    # Far above, p may be subnormal and exp(d) infinite, while q itself is harmless.
    above = log_q.exp() - p - p * d
    terms = torch.where(d.abs() < 0.25, p * series, p * (torch.expm1(d) - d))
    terms = torch.where(d > 1, above, terms)
    return torch.where(p > 0, terms, log_q.exp())
