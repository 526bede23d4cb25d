"""The teacher's head: hidden states go through the vocabulary in chunks, and come out as targets.

Stands between the engine, which gives hidden states, and the cache. Each tensor-parallel rank
holds a slice of the head's rows. A chunk's logits live in one preallocated buffer [C, V]; the
logits of all positions, [N, V], never exist. The log-sum-exp of a chunk is put together from each
rank's maximum and sum, so what a position sends is proportional to K times tp, not to V.

Shape letters: N positions, C positions of a chunk, H hidden size, V this rank's vocabulary slice.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megadistill.errors import TeacherError
from megadistill.targets import SparseTargets, concatenate
from megadistill.targets.distributions import VocabularySlice
from megadistill.targets.sparse import spread
from megadistill.teacher.select import select_targets

# Bytes of one chunk's logits. Selecting needs about six times as much again for its integers. On a
# CPU the C library hands buffers of 32 MiB and more back to the kernel each time, and fresh pages
# took more time than all arithmetic: 2,600 positions/s instead of 6,000 at a vocabulary of 32,000.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}


class TeacherHead:
    """Rows [first, first + size) of the model's output projection, and what follows it."""

    def __init__(
        self,
        weight_VH: torch.Tensor,
        vocabulary: VocabularySlice,
        *,
        bias_V: torch.Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        self.weight_VH, self.bias_V = weight_VH, bias_V
        self.vocabulary, self.scale, self.softcap = vocabulary, scale, softcap
        device = weight_VH.device
        chunk_bytes = chunk_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
        # Slices differ in size, but all ranks must come to the collectives equally often.
        largest = vocabulary.size
        if vocabulary.ranks > 1:
            largest = int(vocabulary.gather(torch.tensor(largest, device=device)).max())
        self.chunk = max(1, min(1024, chunk_bytes // (4 * largest)))

    @functools.cached_property
    def buffer_CV(self) -> torch.Tensor:
        """float32 [C, V]: a chunk's logits. Whoever brings memory of his own needs none."""
        return torch.empty(
            self.chunk, self.vocabulary.size, dtype=torch.float32, device=self.weight_VH.device
        )

    @classmethod
    def of(
        cls, model: Any, *, rank: int, ranks: int, group: Any, device: Any, vocab_size: int
    ) -> TeacherHead:
        """Cut this rank's slice out of the first `vocab_size` rows of a transformers model's head.

        Above them lies padding: vocabularies are rounded up, to 152,064 rows for 151,665 tokens in
        Qwen2.5-7B, and to another number in the next size of the family. So distributions are over
        tokens, and teacher and student need not be padded alike.
        """
        weight_VH = model.get_output_embeddings().weight.detach()
        bias_V = getattr(model.get_output_embeddings(), "bias", None)
        V = min(vocab_size, weight_VH.shape[0])
        first, last = V * rank // ranks, V * (rank + 1) // ranks
        scale, softcap = logit_scale(model.config), soft_cap(model.config)
        return cls(
            weight_VH[first:last].to(device, copy=True),
            VocabularySlice(first, last - first, group if ranks > 1 else None),
            bias_V=None if bias_V is None else bias_V.detach()[first:last].to(device, copy=True),
            scale=scale,
            softcap=softcap,
        )

    def log_probs(
        self,
        hidden_CH: torch.Tensor,
        *,
        temperature: float = 1.0,
        out_CV: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """float32 [C, V], this rank's slice; a view of the buffer, valid until the next call.

        out_CV: to be written to in place of the buffer, of as many rows as are asked for.
        """
        logits_CV = self.buffer_CV[: len(hidden_CH)] if out_CV is None else out_CV
        _matmul(hidden_CH.to(self.weight_VH.dtype), self.weight_VH, out=logits_CV)
        if self.bias_V is not None:
            logits_CV += self.bias_V
        if self.scale != 1.0:
            logits_CV *= self.scale
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        if temperature != 1.0:
            logits_CV /= temperature
        top_C = self.vocabulary.gather(logits_CV.amax(1)).amax(0)
        logits_CV -= top_C[:, None]
        sums_RC = self.vocabulary.gather(_sum_exp(logits_CV))
        # Added in rank order, which an all-reduce does not promise.
        logits_CV -= sums_RC.sum(0).log()[:, None]
        return logits_CV

    def targets(
        self,
        hidden_NH: torch.Tensor,
        labels_N: torch.Tensor,
        keys_N: torch.Tensor,
        *,
        temperature: float = 1.0,
        **selection: Any,
    ) -> SparseTargets:
        """The targets of N positions; those with label -100 are dropped before any arithmetic.

        `selection` goes to `select_targets`: method and its parameters, seed, min_entropy, ...
        """
        keep_N = labels_N != -100
        kept = keep_N.nonzero()[:, 0]
        parts = []
        for rows in kept.split(self.chunk) if len(kept) else [kept]:
            log_probs_CV = self.log_probs(hidden_NH[rows], temperature=temperature)
            parts.append(
                select_targets(
                    log_probs_CV,
                    keys_N=keys_N[rows],
                    labels_N=labels_N[rows],
                    temperature=temperature,
                    vocabulary=self.vocabulary,
                    **selection,
                )
            )
        return spread(concatenate(parts), keep_N)


def _sum_exp(logits_CV: torch.Tensor, columns: int = 16384) -> torch.Tensor:
    """float32 [C]: the sum of exponentials, a few columns at a time, added up in float64."""
    parts = [part.exp().sum(1) for part in logits_CV.split(columns, dim=1)]
    return torch.stack(parts).double().sum(0).float()


def _matmul(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, *, out: torch.Tensor) -> None:
    """out = hidden @ weight.T in float32, also of bfloat16 operands."""
    if hidden_CH.dtype == torch.float32:
        torch.mm(hidden_CH, weight_VH.T, out=out)
    elif hidden_CH.is_cuda:
        torch.mm(hidden_CH, weight_VH.T, out_dtype=torch.float32, out=out)
    else:
        # A CPU has no mixed product: some rows at a time, so that no float32 copy of all lives.
        for start in range(0, len(weight_VH), 8192):
            rows = slice(start, start + 8192)
            out[:, rows] = hidden_CH.float() @ weight_VH[rows].float().T


def logit_scale(config: Any) -> float:
    """The factor of the model's logits: Cohere and Falcon-H1 multiply, Granite divides."""
    config = config.get_text_config()
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:
        return 1.0 / float(config.logits_scaling)
    return 1.0


def soft_cap(config: Any) -> float | None:
    """Gemma's bound on logits: softcap * tanh(logits / softcap)."""
    config = config.get_text_config()
    # Of Gemma, RecurrentGemma, xLSTM.
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((cap for cap in (getattr(config, name, None) for name in names) if cap), None)


def check_head(model: Any) -> None:
    """TeacherError for a model without an output projection over the vocabulary."""
    if model.get_output_embeddings() is None:
        raise TeacherError(
            f"teacher.model: {type(model).__name__} has no output embeddings: a causal language "
            "model is needed"
        )
