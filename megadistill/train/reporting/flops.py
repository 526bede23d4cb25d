"""Floating-point operations of a training step, and the peak of each device.

Floating-point operations, a multiplication and an addition counted as two, of the matrix products
alone: norms, activations and the softmax are left out, as everywhere in the literature.

    6 * weights * tokens              every matrix that is multiplied with, forward and backward;
                                      not the embedding, which is a look-up
    6 * vocabulary * hidden * labels  the head, which drops positions without a label beforehand
    12 * heads * head_dim * span      attention's two products for each token and layer; span is
       * tokens                       the sequence, or the layer's sliding window if that is less

What activation checkpointing or the head's recomputation do again is not counted: these are the
model's operations, not the machine's. Attention is counted as the whole square, as in PaLM
(arXiv 2204.02311, appendix B), although half of it, and what lies between documents, is masked. Of
a mixture of experts those chosen for a token count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megadistill.student.model import Student

# Dense bfloat16, 1e12 operations a second, by a part of the device's name; the first that fits.
PEAKS = (
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.5),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 311.8),
    ("A800", 311.8),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("L40S", 362.1),
    ("L4", 121.0),
    ("A10", 125.0),
)


def peak_flops(device: str) -> float | None:
    """The published peak of a device in dense bfloat16, operations a second; None if not known.

    device: as `torch.cuda.get_device_name` has it. Source: NVIDIA's data sheets of each product
    (half of what they give "with sparsity"), SXM boards where the name says nothing else.
    """
    words = f" {device} "
    for name, tera in PEAKS:
        # "L4" is no part of "L40", nor "A10" of "A100".
        if any(f"{before}{name}{after}" in words for before in " -" for after in " -"):
            return tera * 1e12
    return None


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a student, forward and backward."""

    a_token: float  # of the matrices below the head
    a_label: float  # of the head
    seq_len: int
    spans: tuple[tuple[int | None, int], ...]  # (window, heads x head_dim) of each layer

    @classmethod
    def of(cls, student: Student, *, seq_len: int) -> Flops:
        """Counted in the modules themselves, partitioned by ZeRO-3 or not."""
        head = student.head
        rows, hidden = _shape(head.weight)
        matrices = sum(share * _elements(p) for p, share in _matrices(student))
        return cls(
            6.0 * matrices,
            6.0 * (head.vocab_size or rows) * hidden,
            seq_len,
            tuple(_layers(student.config)),
        )

    def step(self, *, tokens: int, labels: float) -> float:
        """Operations of a step, of all ranks together.

        tokens: without padding. labels: positions that have one.
        """
        attended = sum(min(window or self.seq_len, self.seq_len) * w for window, w in self.spans)
        return tokens * self.a_token + labels * self.a_label + 12.0 * tokens * attended


def _matrices(student: Student) -> Iterator[tuple[nn.Parameter, float]]:
    """(matrix, share of the tokens that are multiplied with it), without embeddings and head."""
    tables = {id(m.weight) for m in student.modules() if isinstance(m, nn.Embedding)}
    head, config = student.head, _text(student.config)
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    chosen = _first(config, "num_experts_per_tok", "top_k_experts")
    for name, parameter in student.named_parameters():
        if (
            len(_shape(parameter)) > 1
            and parameter is not head.weight
            and id(parameter) not in tables
        ):
            routed = experts and chosen and ".experts." in name
            yield parameter, chosen / experts if routed else 1.0


def _layers(config: Any) -> Iterator[tuple[int | None, int]]:
    """(sliding window, width of the heads together) of each layer that has attention."""
    config = _text(config)
    count = _first(config, "num_hidden_layers", "n_layer", "num_layers") or 0
    heads = _first(config, "num_attention_heads", "n_head") or 0
    width = _first(config, "hidden_size", "n_embd") or 0
    key_dim = _first(config, "qk_head_dim", "head_dim") or (width // heads if heads else 0)
    value_dim = _first(config, "v_head_dim") or key_dim
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    for kind in kinds:
        if kind in ("full_attention", "sliding_attention", "chunked_attention"):
            local = kind != "full_attention" or not getattr(config, "layer_types", None)
            window = _first(config, "sliding_window", "attention_chunk_size") if local else None
            yield window, heads * (key_dim + value_dim) // 2


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _first(config: Any, *names: str) -> Any:
    return next((v for v in (getattr(config, n, None) for n in names) if v), None)


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    # Under ZeRO-3 `shape` is that of a partition.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _elements(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
