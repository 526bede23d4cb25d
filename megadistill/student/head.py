"""The student's head: from hidden states to the distillation loss without the logits of a batch.

`lm_head` is replaced by `DistillationHead`, which owns the same parameter. Positions go through it
in chunks: logits [C, V] in one buffer, turned in place into their gradient, and from there into the
gradients of the hidden states and of the weight. So [N, V] never exists, and the backward pass only
scales what the forward pass has made: three matrix products in all, as ordinary training has.
Positions whose label is -100 are dropped before any arithmetic.

The weight's gradient is summed over chunks in float32 (float64 for float64 weights), also where the
weight is bfloat16: [V, H] in float32, the price of not rounding once a chunk.

Shapes: N positions, H hidden size, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from megadistill.student.divergences import Entries, Scales, distill_rows
from megadistill.targets import SparseTargets, check_divergence

IGNORED = -100
# 128 MiB of float32 logits: on two cores, chunks of 256 rows at V = 131,072 cost 2 % more time than
# chunks of 1024.
BUFFER_ELEMENTS = 2**25


class LossTerms(NamedTuple):
    """A loss and what it is made of. Sums are detached and carry neither weights nor T squared."""

    loss: torch.Tensor  # scalar, differentiable
    kd_sum: torch.Tensor  # scalar float64
    ce_sum: torch.Tensor  # scalar float64
    kd_count: int  # positions with a label and a target
    ce_count: int  # positions with a label
    agreed: torch.Tensor  # int64; of kd_count, those whose most probable id is the targets'


def fused_linear_distillation(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets: SparseTargets | None,
    labels_N: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """The distillation loss of a linear head, a scalar; options and errors as `distillation_terms`.

    For sampled targets (varopt, multinomial) the distillation term is the cross-entropy; its least
    value is the teacher's entropy, not 0.
    """
    return distillation_terms(hidden_NH, weight_VH, targets, labels_N, **options).loss


def distillation_terms(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets: SparseTargets | None,
    labels_N: torch.Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    normalizer: float | tuple[float, float] | None = None,
    bias_V: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    agreement: bool = False,
) -> LossTerms:
    """kd_weight * T^2 * kd_sum / kd_normalizer + ce_weight * ce_sum / ce_normalizer.

    hidden_NH, weight_VH, bias_V: one floating dtype. Logits are
    softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), without the tanh by default.
    targets: torch tensors on the same device, N rows, or None for hard labels alone; an empty row
    adds to the cross-entropy only. labels_N: int64, the true next tokens; -100 drops a position
    from both terms. The weight may have more rows than the teacher's vocabulary.
    normalizer: of both terms or of (kd, ce); by default the number of positions in each.
    agreement: count the positions where student and targets agree on the most probable id.
    Only forward_kl is served now, at the targets' own temperature.

    Raises ConfigError for a divergence or temperature that the targets cannot serve, ValueError
    for shapes that do not fit and for ids outside the vocabulary.
    """
    if divergence != "forward_kl":
        raise ValueError(f"divergence is {divergence!r}, expected 'forward_kl'")
    if targets is not None:
        check_divergence(
            targets.method, divergence, kd_temperature=temperature, made_at=targets.temperature
        )
    _check_shapes(hidden_NH, weight_VH, targets, labels_N)
    kept = (labels_N != IGNORED).nonzero()[:, 0]
    if len(kept) < len(labels_N):
        hidden_NH, labels_N = hidden_NH[kept], labels_N[kept]
        targets = None if targets is None else take_rows(targets, kept)
    _check_ids(targets, labels_N, weight_VH.shape[0])

    kd_count = 0 if targets is None else int((targets.counts > 0).sum())
    ce_count = len(labels_N)
    if normalizer is None:
        normalizer = (kd_count, ce_count)
    elif not isinstance(normalizer, tuple):
        normalizer = (normalizer, normalizer)
    # Without positions the sums are 0, and so shall be the loss.
    kd_normalizer, ce_normalizer = (float(n) or 1.0 for n in normalizer)
    scales = Scales(
        kd_weight * temperature**2 / kd_normalizer, ce_weight / ce_normalizer, temperature,
        label_smoothing,
    )  # fmt: skip
    chunk = chunk_size or default_chunk(len(labels_N), weight_VH.shape[0])
    loss, kd_sum, ce_sum, agreed = _FusedDistillation.apply(
        hidden_NH, weight_VH, bias_V, targets, labels_N, scales, logit_scale, softcap, chunk,
        agreement,
    )  # fmt: skip
    return LossTerms(loss, kd_sum, ce_sum, kd_count, ce_count, agreed)


class _FusedDistillation(torch.autograd.Function):
    """(loss, kd_sum, ce_sum, agreed); gradients of the loss are formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets: SparseTargets | None,
        labels_N: torch.Tensor,
        scales: Scales,
        logit_scale: float,
        softcap: float | None,
        chunk: int,
        agreement: bool,
    ) -> tuple[torch.Tensor, ...]:
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        (count, _), vocab = hidden_NH.shape, weight_VH.shape[0]
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden_NH = torch.empty_like(hidden_NH) if want_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if want_weight else None
        grad_bias_V = None
        if bias_V is not None and want_bias:
            grad_bias_V = torch.zeros_like(bias_V, dtype=wide)

        def buffer() -> torch.Tensor:
            return hidden_NH.new_empty(min(chunk, count), vocab, dtype=wide)

        z_buffer = buffer()
        scratch = None if scales.temperature == 1 or targets is None else buffer()
        slope = None if softcap is None else buffer()
        # float16 ends at 6e-8, where a gradient divided by the batch lies: divide on the way back,
        # where the loss scaler has its say.
        half = hidden_NH.dtype == torch.float16
        ctx.later = (max(scales.kd, scales.ce) or 1.0) if half else 1.0
        # d loss / d (hidden @ weight.T + bias) carries the logit scale once.
        factor = logit_scale / ctx.later
        scaled = dataclasses.replace(scales, kd=scales.kd * factor, ce=scales.ce * factor)
        kd_sum = hidden_NH.new_zeros((), dtype=torch.float64)
        ce_sum = torch.zeros_like(kd_sum)
        agreed = torch.zeros_like(kd_sum, dtype=torch.int64)
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            hidden_CH, z_CV = hidden_NH[start:stop], z_buffer[: stop - start]
            _logits(hidden_CH, weight_VH, bias_V, logit_scale, z_CV)
            if softcap is not None and slope is not None:
                z_CV.div_(softcap).tanh_()
                torch.square(z_CV, out=slope[: stop - start]).neg_().add_(1)
                z_CV.mul_(softcap)
            entries = None
            if targets is not None:
                entries = Entries.of(targets.rows(start, stop), wide)
                if agreement:
                    agreed += entries.top_id().eq(z_CV.argmax(1)).sum()
            kd_C, ce_C = distill_rows(
                z_CV, entries, labels_N[start:stop], scaled,
                scratch_CV=None if scratch is None else scratch[: stop - start],
            )  # fmt: skip
            kd_sum += kd_C.double().sum()
            ce_sum += ce_C.double().sum()
            if slope is not None:
                z_CV.mul_(slope[: stop - start])
            if grad_hidden_NH is not None:
                torch.mm(z_CV.to(weight_VH.dtype), weight_VH, out=grad_hidden_NH[start:stop])
            if grad_weight_VH is not None:
                _accumulate(grad_weight_VH, z_CV, hidden_CH)
            if grad_bias_V is not None:
                grad_bias_V += z_CV.sum(0)
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH, grad_bias_V)
        ctx.mark_non_differentiable(kd_sum, ce_sum, agreed)
        loss = (scales.kd * kd_sum + scales.ce * ce_sum).to(wide)
        return loss, kd_sum, ce_sum, agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grads = ctx.saved_tensors
        grad_loss = grad_loss * ctx.later
        if grad_loss != 1:
            for grad in grads:
                if grad is not None:
                    # In place: at V = 128k a second [V, H] costs 2 GB.
                    grad.mul_(grad_loss)
        return *grads, *[None] * 7


def _logits(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    scale: float,
    out_CV: torch.Tensor,
) -> None:
    if out_CV.dtype == hidden_CH.dtype:
        torch.mm(hidden_CH, weight_VH.T, out=out_CV)
    else:
        out_CV.copy_(hidden_CH @ weight_VH.T)
    if bias_V is not None:
        out_CV.add_(bias_V)
    if scale != 1:
        out_CV.mul_(scale)


def _accumulate(sum_VH: torch.Tensor, z_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
    """sum += z.T @ hidden, the sum in float32 whatever the factors are."""
    if hidden_CH.dtype != sum_VH.dtype and hidden_CH.is_cuda:
        # Tensor cores multiply in the factors' dtype and add up in float32.
        product_VH = torch.mm(z_CV.to(hidden_CH.dtype).T, hidden_CH, out_dtype=sum_VH.dtype)
        sum_VH.add_(product_VH)
    else:
        sum_VH.addmm_(z_CV.T, hidden_CH.to(sum_VH.dtype))


def default_chunk(positions: int, vocab: int) -> int:
    """Positions of a chunk: what the buffer holds, and an eighth of the batch at most."""
    return max(1, min(BUFFER_ELEMENTS // vocab, max(64, -(-positions // 8))))


def take_rows(targets: SparseTargets, rows: torch.Tensor) -> SparseTargets:
    """The targets of the given positions only (ids, weights and tail; nothing else is needed)."""
    counts = targets.counts[rows]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    entries = torch.arange(int(offsets[-1]), device=counts.device)
    entries += torch.repeat_interleave(targets.offsets[:-1][rows] - offsets[:-1], counts)
    return SparseTargets(
        offsets, targets.ids[entries], targets.weights[entries], targets.tail[rows],
        targets.method, targets.temperature,
    )  # fmt: skip


def _check_shapes(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets: SparseTargets | None,
    labels_N: torch.Tensor,
) -> None:
    count, width = hidden_NH.shape
    if weight_VH.shape[1] != width:
        raise ValueError(f"hidden is {width} wide, the weight {weight_VH.shape[1]}")
    if len(labels_N) != count:
        raise ValueError(f"{count} hidden states and {len(labels_N)} labels, expected equal")
    if targets is not None and len(targets) != count:
        raise ValueError(f"{count} hidden states and {len(targets)} targets, expected equal")


def _check_ids(targets: SparseTargets | None, labels_N: torch.Tensor, vocab: int) -> None:
    """A wrong id would read and write another position's logits, so this costs one look each."""
    for name, ids in (("label", labels_N), ("target id", None if targets is None else targets.ids)):
        if ids is not None and len(ids):
            low, high = (int(bound) for bound in torch.aminmax(ids))
            if low < 0 or high >= vocab:
                wrong = low if low < 0 else high
                raise ValueError(f"{name} {wrong} lies outside the head's {vocab} rows")


class DistillationHead(nn.Module):
    """Stands in for `lm_head` and owns its parameters, tied to the embedding or not.

    Called with hidden states alone it is the linear layer it replaced, so that the model stays a
    model: it can generate, be evaluated and be saved. Called with labels it returns `LossTerms`.
    """

    def __init__(
        self, linear: nn.Module, *, logit_scale: float = 1.0, softcap: float | None = None
    ) -> None:
        super().__init__()
        weight, bias = linear.weight, getattr(linear, "bias", None)
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        self.weight: nn.Parameter = weight
        self.bias: nn.Parameter | None = bias
        self.logit_scale, self.softcap = logit_scale, softcap

    def forward(
        self,
        hidden: torch.Tensor,
        labels_N: torch.Tensor | None = None,
        targets: SparseTargets | None = None,
        **options: Any,
    ) -> torch.Tensor | LossTerms:
        """Logits as `lm_head` gives them (the model scales and caps), or the terms of the loss.

        hidden: [..., H]; labels_N and targets over all its positions. options: those of
        `distillation_terms`.
        """
        if labels_N is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        return distillation_terms(
            hidden.reshape(-1, hidden.shape[-1]), self.weight, targets, labels_N,
            bias_V=self.bias, logit_scale=self.logit_scale, softcap=self.softcap, **options,
        )  # fmt: skip
