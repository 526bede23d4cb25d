"""The student's head: from hidden states to the distillation loss without the logits of a batch.

`lm_head` is replaced by `DistillationHead`, which owns the same parameter. Positions whose label is
-100 are dropped before any arithmetic; the others go through the head in chunks (fused.py), each
row of a chunk through one pass that serves every term of the loss (row_kernel.py, divergences/).

Shapes: N positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megadistill.student.loss.divergences import divergence_of
from megadistill.student.loss.fused import (
    BUFFER_ELEMENTS,
    DENSE_ELEMENTS,
    MODES,
    Chunks,
    FusedDistillation,
    Sums,
    TeacherTerm,
    choose_mode,
    default_chunk,
)
from megadistill.student.loss.ragged_targets import assign_tail_to_label
from megadistill.student.loss.row_kernel import Terms
from megadistill.student.loss.terms import CE, KD, LossTerms, Z
from megadistill.student.projection import PROJECTOR
from megadistill.targets import check_divergence
from megadistill.targets.dense import DenseTargets
from megadistill.targets.distributions import VocabularySlice
from megadistill.targets.kinds import Member, Targets
from megadistill.targets.projected import ProjectedTargets
from megadistill.teacher.chunked_head import TeacherHead

IGNORED = -100


def distillation_terms(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets: Targets | None,
    labels_N: torch.Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    head_mass: float = 0.5,
    divergence_options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ground_truth_residual: bool = False,
    normalizer: float | tuple[float, float] | None = None,
    bias_V: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    mode: str | None = None,
    memory_budget: float | None = None,
    chunk_size: int | None = None,
    agreement: bool = False,
    calibration: bool = False,
) -> LossTerms:
    """kd_weight * T^2 * kd_sum / kd_n + (ce_weight * ce_sum + z_loss * z_sum) / ce_n.

    hidden_NH, weight_VH, bias_V: one floating dtype. Logits are
    softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), without the tanh by default.
    targets: torch tensors on the same device, N rows, or None for hard labels alone; an empty row
    adds to the cross-entropy only. DenseTargets are compared in full, or over the union of what
    both sides find most probable, by any divergence, at `temperature`. Of an Ensemble the kd_sum
    is the sum of each teacher's, times its share: a further pass over the logits for each, which
    takes a copy of a chunk's. labels_N: int64, the true next tokens; -100 drops a position from
    both terms.
    divergence: a registered name, of `divergences/`, where beta (jsd), alpha (skewed) and head_mass
    (adaptive) are explained; divergence_options: parameters of another distribution's. topk and
    topp serve all of them, the tail as one bucket; varopt and multinomial forward_kl.
    temperature: T. Another than the targets' own, for topk and topp only, is the coarse divergence:
    both sides are put into buckets at the targets' temperature, then softened.
    ground_truth_residual: the mass that topk and topp leave out belongs to the true token.
    normalizer: of both terms or of (kd, ce), kd_n and ce_n; by default the number of positions.
    vocab_size: rows of the weight that take part; those above are padding, with probability 0 and
    no gradient. By default all.
    mode: "forward" or "recompute", of `fused.py`; by default the first unless what it keeps until
    the backward pass, [N, H] and float32 [V, H], exceeds memory_budget, in GiB.
    agreement: count the positions where student and targets agree on the most probable id, of
    an ensemble those of its first teacher.
    calibration: compare the student's largest probability, at temperature 1, with how often it is
    that of the label.

    Raises ConfigError for a divergence or temperature that the targets cannot serve, ValueError
    for shapes that do not fit and for ids outside the vocabulary.
    """
    members = () if targets is None else targets.members
    for member, _ in members:
        check_divergence(
            member.method,
            divergence,
            kd_temperature=temperature,
            made_at=_made_at(member, temperature),
            ground_truth_residual=ground_truth_residual,
        )
    vocab = weight_VH.shape[0] if vocab_size is None else vocab_size
    _check_shapes(hidden_NH, weight_VH, targets, labels_N, vocab)
    kept = (labels_N != IGNORED).nonzero()[:, 0]
    if len(kept) < len(labels_N):
        hidden_NH, labels_N = hidden_NH[kept], labels_N[kept]
        targets = None if targets is None else targets.take(kept)
    _check_ids(targets, labels_N, vocab)
    members = () if targets is None else targets.members
    ce_count, kd_count = len(labels_N), 0 if targets is None else targets.count_targets()
    teachers = tuple(
        TeacherTerm(
            _with_residual(member, labels_N) if ground_truth_residual else member,
            share,
            _made_at(member, temperature),
        )
        for member, share in members
    )

    if normalizer is None:
        normalizer = (kd_count, ce_count)
    elif not isinstance(normalizer, tuple):
        normalizer = (normalizer, normalizer)
    # Without positions the sums are 0, and so shall be the loss.
    kd_normalizer, ce_normalizer = (float(n) or 1.0 for n in normalizer)
    terms = Terms(
        kd=kd_weight * temperature**2 / kd_normalizer,
        ce=ce_weight / ce_normalizer,
        z=z_loss / ce_normalizer,
        temperature=temperature,
        label_smoothing=label_smoothing,
        divergence=divergence_of(
            divergence, beta=beta, alpha=alpha, head_mass=head_mass, options=divergence_options
        ),
    )
    dense = any(member.dense is not None for member, _ in members)
    buffer_elements = DENSE_ELEMENTS if dense else BUFFER_ELEMENTS
    chunk = chunk_size or default_chunk(ce_count, len(weight_VH), buffer_elements)
    chunks = Chunks(
        teachers, labels_N, terms, vocab, chunk, logit_scale, softcap, agreement, calibration
    )
    mode = mode or choose_mode(hidden_NH, weight_VH, memory_budget)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    loss, *sums = FusedDistillation.apply(hidden_NH, weight_VH, bias_V, chunks, mode)
    kd_sum, ce_sum, z_sum, agreed, calibration_M3 = Sums(*sums)
    by_name = {KD.name: kd_sum, CE.name: ce_sum, Z.name: z_sum}
    return LossTerms(loss, by_name, kd_count, ce_count, agreed, calibration_M3)


def _made_at(member: Member, temperature: float) -> float:
    """The temperature of the targets; whole distributions are made at the one that is asked for."""
    return temperature if member.listed is None else member.listed.temperature


def _with_residual(member: Member, labels_N: torch.Tensor) -> Member:
    assert member.listed is not None  # check_divergence refuses the others
    return assign_tail_to_label(member.listed, labels_N)


def _check_shapes(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets: Targets | None,
    labels_N: torch.Tensor,
    vocab: int,
) -> None:
    count, width = hidden_NH.shape
    if weight_VH.shape[1] != width:
        raise ValueError(f"hidden is {width} wide, the weight {weight_VH.shape[1]}")
    if not 0 < vocab <= weight_VH.shape[0]:
        raise ValueError(f"vocab_size is {vocab}, expected 1 to the weight's {len(weight_VH)} rows")
    if len(labels_N) != count:
        raise ValueError(f"{count} hidden states and {len(labels_N)} labels, expected equal")
    if targets is not None and len(targets) != count:
        raise ValueError(f"{count} hidden states and {len(targets)} targets, expected equal")


def _check_ids(targets: Targets | None, labels_N: torch.Tensor, vocab: int) -> None:
    """A wrong id would read and write another position's logits, so this costs one look each."""
    _check_range("label", labels_N, vocab)
    for member, _ in () if targets is None else targets.members:
        if member.listed is not None:
            _check_range("target id", member.listed.ids, vocab)
        theirs = 0 if member.dense is None else member.dense.vocab_size
        if theirs > vocab:
            raise ValueError(f"the teacher has {theirs} ids, expected at most the head's {vocab}")


def _check_range(name: str, ids: torch.Tensor, vocab: int) -> None:
    if not len(ids):
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} {wrong} lies outside the head's {vocab} rows")


class DistillationHead(nn.Module):
    """Stands in for `lm_head` and owns its parameters, tied to the embedding or not.

    Called with hidden states alone it is the linear layer it replaced, so that the model stays a
    model: it can generate, be evaluated and be saved. Called with labels it returns `LossTerms`.
    vocab_size: rows that take part in the loss, of `distillation_terms`; logits are always of all.
    """

    def __init__(
        self,
        linear: nn.Module,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        weight, bias = linear.weight, getattr(linear, "bias", None)
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        self.weight: nn.Parameter = weight
        self.bias: nn.Parameter | None = bias
        self.logit_scale, self.softcap, self.vocab_size = logit_scale, softcap, vocab_size

    def forward(
        self,
        hidden: torch.Tensor,
        labels_N: torch.Tensor | None = None,
        targets: Any = None,
        **options: Any,
    ) -> torch.Tensor | LossTerms:
        """Logits as `lm_head` gives them (the model scales and caps), or the terms of the loss.

        hidden: [..., H]; labels_N and targets, of any kind, over all its positions. options: those
        of `distillation_terms`.
        """
        if labels_N is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        hidden_NH = hidden.reshape(-1, hidden.shape[-1])
        if targets is not None and targets.needs_projector:
            return self._projected(hidden_NH, labels_N, targets, **options)
        return self._terms(hidden_NH, self.weight, self.bias, labels_N, targets, **options)

    def _terms(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        targets: Targets | None,
        **options: Any,
    ) -> LossTerms:
        return distillation_terms(
            hidden_NH,
            weight_VH,
            targets,
            labels_N,
            bias_V=bias_V,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            vocab_size=self.vocab_size,
            **options,
        )

    def _projected(
        self,
        hidden_NH: torch.Tensor,
        labels_N: torch.Tensor,
        targets: ProjectedTargets,
        **options: Any,
    ) -> LossTerms:
        """The terms of the loss, and the projector's own cross-entropy, of weight 1."""
        space_NS = targets.space_NS
        assert space_NS is not None
        weight_VH, bias_V = self.weight.detach(), None if self.bias is None else self.bias.detach()
        vocab = len(weight_VH) if self.vocab_size is None else self.vocab_size
        opinion = TeacherHead(
            weight_VH[:vocab],
            VocabularySlice(0, vocab, None),
            bias_V=None if bias_V is None else bias_V[:vocab],
            scale=self.logit_scale,
            softcap=self.softcap,
        )
        taught = DenseTargets(space_NS.detach(), opinion, has_N=targets.has_N)
        terms = self._terms(hidden_NH, self.weight, self.bias, labels_N, taught, **options)
        given = options.get("normalizer")
        own = self._terms(
            space_NS,
            weight_VH,
            bias_V,
            labels_N.masked_fill(~targets.has_N, IGNORED),
            None,
            ce_weight=1.0,
            normalizer=given[0] if isinstance(given, tuple) else given,
        )
        sums = terms.sums | {PROJECTOR.name: own.ce_sum}
        return terms._replace(loss=terms.loss + own.loss, sums=sums)
