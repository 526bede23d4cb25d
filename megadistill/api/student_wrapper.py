"""A transformers model as a student in a training loop of one's own.

launch/train.py partitions its student by ZeRO-3 (student/model.py); here the model is as it comes,
for plain torch, DistributedDataParallel or FSDP.

Shapes: B sequences, T positions, N = B*T, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import torch
from torch import nn

from megadistill.api.arguments import in_callers_words
from megadistill.api.cache_batches import Batch
from megadistill.api.fused_loss import LossOptions, loss_terms
from megadistill.api.model_inputs import device_of, forward_inputs
from megadistill.cache.reader import Cache
from megadistill.cache.recorded_settings import pack_of
from megadistill.errors import ArgumentError
from megadistill.models.attention import Pack, check_isolation
from megadistill.models.documents_apart import DocumentsApart, runs_apart
from megadistill.models.experts import router_loss
from megadistill.models.pretrained import backbone
from megadistill.student.head import DistillationHead
from megadistill.student.model import Student, check_fits


class StudentOutput(NamedTuple):
    """The loss of a batch, and its parts for a log.

    loss      scalar, differentiable
    kd_loss   scalar, detached: the mean divergence, without weight and T squared; of sampled
              targets the cross-entropy
    ce_loss   scalar, detached: the mean cross-entropy of the labels
    kd_count  positions in kd_loss
    ce_count  positions in ce_loss
    """

    loss: torch.Tensor
    kd_loss: torch.Tensor
    ce_loss: torch.Tensor
    kd_count: int
    ce_count: int


class WrappedStudent(nn.Module):
    """A causal language model whose forward pass takes a Batch and returns its loss.

    `model` is the transformers model that was wrapped: it generates, is evaluated and is saved
    (`student.model.save_pretrained(folder)`) as before.
    """

    def __init__(self, model: Any, *, vocab_size: int | None, pack: Pack) -> None:
        super().__init__()
        self.student = Student(model, vocab_size=vocab_size)
        self.pack: Pack = pack

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.student.model

    @property
    def head(self) -> DistillationHead:
        return self.student.head

    def forward(self, batch: Batch, **options: Unpack[LossOptions]) -> StudentOutput:
        """Return the loss of a batch, which is brought to the model's device.

        options: keyword arguments of `fused_linear_distillation`, such as divergence, temperature,
        ce_weight and normalizer. A mixture of experts that returns its routers' logits adds its own
        balancing loss. ArgumentError (a ValueError) for arguments that do not fit.
        """
        if not isinstance(batch, Batch):
            raise ArgumentError(
                f"batch is a {type(batch).__name__}, expected a Batch, as collate returns it"
            )
        batch, head = batch.to(device_of(self)), self.head
        output = self._hidden_states(batch)
        hidden_NH = output.last_hidden_state.flatten(0, -2)
        terms = loss_terms(
            hidden_NH,
            head.weight,
            batch.targets,
            batch.labels_BT,
            bias_V=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            vocab_size=head.vocab_size,
            **options,
        )
        loss = terms.loss
        if self.student.router_loss_weight:
            routers = router_loss(self.model, output.router_logits, _token_mask(batch))
            loss = loss + self.student.router_loss_weight * routers
        return StudentOutput(
            loss,
            terms.kd_sum / max(terms.kd_count, 1),
            terms.ce_sum / max(terms.ce_count, 1),
            terms.kd_count,
            terms.ce_count,
        )

    def _hidden_states(self, batch: Batch) -> Any:
        core = backbone(self.model)
        if runs_apart(self.model, self.pack):
            tokens_BT, device = batch.tokens_BT.cpu().numpy(), batch.tokens_BT.device
            return DocumentsApart.of(tokens_BT, batch.documents, device=device).run(
                core, lockstep=True
            )
        return core(**forward_inputs(self.model, batch.tokens_BT, batch.documents, pack=self.pack))


def wrap_student(model: Any, cache: Cache | None = None, *, check: bool = True) -> WrappedStudent:
    """Return a student whose forward pass takes a Batch and never forms [N, V] logits.

    model  a causal language model of transformers, on any device. Its output projection is
           replaced, in place, by one that owns the same weight
    cache  the cache to learn from. It tells how documents are packed and how many ids there are.
           None: documents are kept apart, and every row of the head is an id
    check  compare, by short forward passes, the model's own logits with the head's, and a document
           in a packed sequence with the same document alone

    Raises ArgumentError (a ValueError) for a model that has no linear output projection, fewer ids
    or a shorter context than the cache, or lets packed documents see each other.
    """
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise ArgumentError(
            f"model is a {type(model).__name__}, expected a causal language model of transformers"
        )
    if isinstance(model.get_output_embeddings(), DistillationHead):
        raise ArgumentError("model is wrapped already, expected a model as transformers loads it")
    name = type(model).__name__
    with in_callers_words():
        pack: Pack = "isolate"
        if cache is not None:
            settings = model.config.get_text_config()
            seq_len = int(cache.recipe["seq_len"])
            check_fits(settings, vocab_size=cache.vocab_size, seq_len=seq_len)
            pack = "concat" if pack_of(cache.recipe) == "concat" else "isolate"
        wrapped = WrappedStudent(
            model, vocab_size=None if cache is None else cache.vocab_size, pack=pack
        )
        if check:
            device = device_of(model)
            wrapped.student.check_head(name=name, device=device)
            if cache is not None and pack == "isolate":
                check_isolation(
                    backbone(model),
                    name=name,
                    seq_len=seq_len,
                    vocab_size=cache.vocab_size,
                    device=device,
                )
    return wrapped


def _token_mask(batch: Batch) -> torch.Tensor | None:
    """Return 0 at padding, int64 [B, T]; None without padding."""
    if not batch.padding_B.any():
        return None
    T = batch.tokens_BT.shape[1]
    mask_BT = torch.arange(T) < T - batch.padding_B[:, None]
    return mask_BT.long().to(batch.tokens_BT.device)
