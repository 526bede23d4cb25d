"""The fused linear and distillation loss, for trainers of one's own.

Shapes: N positions, B sequences, T positions of a sequence, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

import torch

from megadistill.api.arguments import (
    Array,
    floats,
    in_callers_words,
    labels,
    number,
    require_device,
    rows_of,
    sparse_targets,
    whole,
)
from megadistill.errors import ArgumentError
from megadistill.student.head import distillation_terms
from megadistill.student.loss.terms import LossTerms
from megadistill.targets import SparseTargets
from megadistill.targets.dense import DenseTargets
from megadistill.targets.ensemble import Ensemble
from megadistill.targets.kinds import Targets


class LossOptions(TypedDict, total=False):
    """Keyword arguments of the loss. `fused_linear_distillation` explains them."""

    divergence: str
    temperature: float
    kd_weight: float
    ce_weight: float
    label_smoothing: float
    normalizer: float | tuple[float, float] | None
    beta: float
    alpha: float
    head_mass: float
    divergence_options: Mapping[str, Any] | None
    z_loss: float
    ground_truth_residual: bool
    mode: str | None
    memory_budget: float | None
    chunk_size: int | None


def fused_linear_distillation(
    hidden_NH: Array,
    weight_VH: Array,
    targets: SparseTargets | None,
    labels_N: Array,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    normalizer: float | tuple[float, float] | None = None,
    beta: float = 0.5,
    alpha: float = 0.1,
    head_mass: float = 0.5,
    divergence_options: Mapping[str, Any] | None = None,
    z_loss: float = 0.0,
    ground_truth_residual: bool = False,
    mode: str | None = None,
    memory_budget: float | None = None,
    chunk_size: int | None = None,
    bias_V: Array | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Return the distillation loss of a linear head, a scalar. [N, V] never exists.

    The loss is kd_weight * T^2 * mean(divergence) + ce_weight * mean(cross-entropy of the labels)
    + z_loss * mean(logsumexp^2). For sampled targets (varopt, multinomial) the divergence is given
    as the cross-entropy, whose least value is the teacher's entropy, not 0.

    hidden_NH    last hidden states, [N, H] or [B, T, H], of the head's dtype
    weight_VH    the head's weight. Under autocast both are cast, as torch's own linear layer does
    targets      N positions, numpy arrays or tensors on the device of hidden_NH. None: labels alone
    labels_N     true next tokens, integers [N] or [B, T]; -100 drops the position from every term

    divergence   forward_kl, reverse_kl, jsd (beta), skewed_kl and skewed_reverse_kl (alpha), tvd or
                 adaptive_kl (head_mass). topk and topp targets serve all of them, with what the
                 list leaves out as one bucket; sampled targets serve forward_kl. Or the name
                 of one that another distribution registers, with its divergence_options
    temperature  T. For sampled targets the one they were made at. topk and topp at another
                 temperature than their own: both sides are put into buckets, then softened
    kd_weight, ce_weight, z_loss  weights of the terms
    label_smoothing               of the cross-entropy
    normalizer   positions to divide by, one number or (distillation, cross-entropy). None: those of
                 this call. For gradient accumulation pass the counts of the whole batch,
                 divided by the ranks where their gradients are averaged
    ground_truth_residual         the mass that topk and topp leave out belongs to the true token

    mode         "forward": gradients are formed in the forward pass. "recompute": chunks are
                 computed again in the backward pass, which keeps less. None: by memory_budget, GiB
    chunk_size   positions of a chunk of logits
    bias_V, logit_scale, softcap  logits are softcap * tanh(logit_scale * (hidden @ weight.T + bias)
                 / softcap); without a softcap there is no tanh
    vocab_size   rows of the weight that take part; those above are padding

    Raises ArgumentError (a ValueError) for arguments that do not fit.
    """
    return loss_terms(
        hidden_NH,
        weight_VH,
        targets,
        labels_N,
        bias_V=bias_V,
        logit_scale=logit_scale,
        softcap=softcap,
        vocab_size=vocab_size,
        divergence=divergence,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        label_smoothing=label_smoothing,
        normalizer=normalizer,
        beta=beta,
        alpha=alpha,
        head_mass=head_mass,
        divergence_options=divergence_options,
        z_loss=z_loss,
        ground_truth_residual=ground_truth_residual,
        mode=mode,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
    ).loss


def loss_terms(
    hidden_NH: Array,
    weight_VH: Array,
    targets: Targets | None,
    labels_N: Array,
    *,
    bias_V: Array | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    **options: Unpack[LossOptions],
) -> LossTerms:
    """Return the terms of `fused_linear_distillation`, which explains the arguments."""
    check_options(options)
    rows_NH, positions = rows_of("hidden_NH", floats("hidden_NH", hidden_NH))
    weight = _weight(weight_VH, rows_NH)
    bias = None if bias_V is None else floats("bias_V", bias_V)
    vocab = len(weight) if vocab_size is None else whole("vocab_size", vocab_size)
    if vocab > len(weight):
        raise ArgumentError(
            f"vocab_size is {vocab}, expected at most {len(weight)}, the rows of weight_VH"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(f"bias_V is {list(bias.shape)}, expected [{len(weight)}]")
    if softcap is not None:
        number("softcap", softcap, above=0)
    device = rows_NH.device
    ids_N = labels(labels_N, vocab=vocab, positions=positions, device=device, beside="hidden_NH")
    taught = _targets(targets, len(rows_NH), device, beside="hidden_NH")
    rows_NH, weight, bias = _one_dtype(rows_NH, weight, bias)
    # The kernels choose their own dtypes.
    with in_callers_words(), torch.autocast(device.type, enabled=False):
        return distillation_terms(
            rows_NH,
            weight,
            taught,
            ids_N,
            bias_V=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            vocab_size=vocab_size,
            **options,
        )


def check_options(options: LossOptions) -> None:
    """ArgumentError for an unknown name, and for a number out of its bounds."""
    unknown = set(options) - set(LossOptions.__annotations__)
    if unknown:
        raise ArgumentError(
            f"unknown keyword argument {min(unknown)!r}, expected one of "
            f"{', '.join(LossOptions.__annotations__)}"
        )
    number("temperature", options.get("temperature", 1.0), above=0)
    for name in ("kd_weight", "ce_weight", "z_loss"):
        number(name, options.get(name, 0.0), least=0)  # type: ignore[arg-type]
    number("label_smoothing", options.get("label_smoothing", 0.0), least=0, below=1)
    for name in ("beta", "alpha", "head_mass"):
        number(name, options.get(name, 0.5), above=0, below=1)  # type: ignore[arg-type]
    _check_normalizer(options.get("normalizer"))
    if options.get("chunk_size") is not None:
        whole("chunk_size", options["chunk_size"])


def _check_normalizer(value: Any) -> None:
    both = value if isinstance(value, tuple) else (value,)
    if len(both) > 2:
        raise ArgumentError(
            f"normalizer is {value!r}, expected one number or two: (distillation, cross-entropy)"
        )
    for each in both:
        # A term without positions has a sum of 0.
        number("normalizer", 0.0 if each is None else float(each), least=0)


def _weight(value: Array, hidden_NH: torch.Tensor) -> torch.Tensor:
    weight_VH, width = floats("weight_VH", value), hidden_NH.shape[1]
    if weight_VH.ndim != 2 or weight_VH.shape[1] != width:
        turned = weight_VH.ndim == 2 and weight_VH.shape[0] == width
        raise ArgumentError(
            f"weight_VH is {list(weight_VH.shape)}, expected [V, {width}], as wide as hidden_NH"
            f"{': pass its transpose' if turned else ''}"
        )
    require_device("weight_VH", value, hidden_NH.device, beside="hidden_NH")
    return weight_VH.to(hidden_NH.device)


def _targets(value: Any, count: int, device: torch.device, *, beside: str) -> Targets | None:
    if value is None:
        return None
    if isinstance(value, DenseTargets | Ensemble):
        taught: Targets = value
    else:
        sparse = sparse_targets(value)
        if isinstance(sparse.ids, torch.Tensor) and sparse.ids.device != device:
            raise ArgumentError(
                f"targets are on {sparse.ids.device}, {beside} is on {device}: pass "
                f"targets.torch({str(device)!r})"
            )
        taught = sparse.torch(device)
    if len(taught) != count:
        raise ArgumentError(
            f"targets have {len(taught)} positions, expected {count}, as {beside} has"
        )
    return taught


def _one_dtype(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return all three in one dtype: autocast's where it is on, else the one they have."""
    kind = hidden_NH.device.type
    if torch.is_autocast_enabled(kind) and hidden_NH.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        bias_V = None if bias_V is None else bias_V.to(dtype)
        return hidden_NH.to(dtype), weight_VH.to(dtype), bias_V
    for name, tensor in (("weight_VH", weight_VH), ("bias_V", bias_V)):
        if tensor is not None and tensor.dtype != hidden_NH.dtype:
            raise ArgumentError(
                f"{name} is {tensor.dtype}, hidden_NH is {hidden_NH.dtype}: pass both in one "
                "dtype, or run the forward pass under torch.autocast"
            )
    return hidden_NH, weight_VH, bias_V
