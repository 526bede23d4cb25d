"""The student: a transformers causal language model, spread by ZeRO-3, with our head.

Every rank makes the model from its configuration under `deepspeed.zero.Init`, so that no more than
one module is ever whole, and rank 0's weights are dealt out parameter by parameter. Rank 0 alone
reads the files: mapped where they are in the type that is trained in, else converted, which holds
the model whole in its host memory. Compared with transformers' own loading under ZeRO-3 this gives
the same weights for random and pretrained models, at every number of ranks, in both major versions
of transformers, without a switch that lives on and would partition the teacher too.

Shapes: B sequences, T positions, N = B*T, H hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from megadistill.config import StudentConfig
from megadistill.errors import ConfigError
from megadistill.models.attention import Pack, forward_inputs
from megadistill.models.context_length import check_seq_len, longest_sequence
from megadistill.models.documents_apart import DocumentsApart, runs_apart
from megadistill.models.experts import (
    are_modules_of_their_own,
    gather_experts_together,
    router_loss,
    router_loss_weight,
)
from megadistill.models.host_memory import return_freed_memory
from megadistill.models.layers import watched
from megadistill.models.precision import restore
from megadistill.models.pretrained import (
    attention_of,
    backbone,
    load_pretrained,
    log_attention,
    model_settings,
)
from megadistill.parallel import Mesh
from megadistill.student.features import FeatureAlignment, FeaturePlan, Features
from megadistill.student.head import DistillationHead
from megadistill.student.loss.terms import CE, KD, LossTerm, Z
from megadistill.student.projection import PROJECTOR, Projector
from megadistill.teacher.chunked_head import logit_scale, soft_cap

# Of the backbone: attention_dropout, resid_pdrop, hidden_dropout_prob; no classifier's.
_DROPOUT = re.compile(r"^(?!classifier|summary).*(dropout|pdrop|dropout_prob)$")


class Student(nn.Module):
    """A causal language model whose head returns the loss. The module that DeepSpeed runs."""

    def __init__(
        self,
        model: Any,
        *,
        vocab_size: int | None = None,
        alignment: FeatureAlignment | None = None,
        projector: Projector | None = None,
    ) -> None:
        """vocab_size: the data's ids; rows of the head above them are padding. By default none.

        alignment: with the teacher's features, where they are to be learned from. projector: of the
        hidden states of a teacher with other tokens.
        """
        super().__init__()
        self.model, self.alignment, self.projector = model, alignment, projector
        self.head_name = replace_head(model, vocab_size=vocab_size)
        self.router_loss_weight = router_loss_weight(model)
        # No sum over positions: each micro-batch adds its share of the step's mean.
        router = LossTerm("router", lambda loss: self.router_loss_weight, count=None)
        self.terms: tuple[LossTerm, ...] = (
            *(KD, CE, Z),
            *((router,) if self.router_loss_weight else ()),
            *((PROJECTOR,) if projector is not None else ()),
            *(alignment.plan.terms if alignment is not None else ()),
        )

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def head(self) -> DistillationHead:
        head = self.model.get_submodule(self.head_name)
        assert isinstance(head, DistillationHead)
        return head

    def forward(
        self,
        labels_N: torch.Tensor | None = None,
        targets: Any = None,
        options: dict[str, Any] | None = None,
        router_share: float | None = None,
        router_mask_BT: torch.Tensor | None = None,
        features: Features | None = None,
        weights: Mapping[str, float] | None = None,
        apart: DocumentsApart | None = None,
        **inputs: Any,
    ) -> Any:
        """The `LossTerms` of a micro-batch; without labels what the model itself returns.

        inputs: of `attention.forward_inputs`. apart: in their place, documents that run apart,
        which is collective. labels_N, targets, options: of `distillation_terms`.
        features: the teacher's, to align with, which needs a normalizer in options. weights: by the
        name of the term; those of options are not read from it. A weight of 0 leaves nothing out: a
        parameter that some steps do not use would keep the gradient of the step before.
        router_share: one over the micro-batches of the step, to add the routers' loss where the
        model has one. It is no sum over positions, so, as everywhere, it is that of each
        micro-batch, and their mean: equal at every number of ranks.
        router_mask_BT: 0 at padding, which the routers' loss does not count; None without padding.
        """
        if labels_N is None:
            return self.model(**inputs)
        options = options or {}
        alignment = None if features is None else self.alignment
        layers = {} if alignment is None else alignment.plan.of_student
        with watched(self.model, **layers) as seen:
            core = backbone(self.model)
            output = core(**inputs) if apart is None else apart.run(core, lockstep=True)
        if targets is not None and targets.needs_projector:
            assert self.projector is not None
            targets = targets.through(self.projector)
        terms = self.head(output.last_hidden_state, labels_N, targets, **options)
        if router_share is not None and self.router_loss_weight:
            router = router_share * router_loss(self.model, output.router_logits, router_mask_BT)
            terms = terms.plus("router", router, self.router_loss_weight)
        if alignment is not None:
            count = max(options["normalizer"][1], 1)
            for name, total in alignment(seen, features, labels_N).items():
                terms = terms.plus(name, total, (weights or {})[name] / count)
        return terms

    def checkpoint_activations(self) -> None:
        """Keeps only the input of each layer; the backward pass computes the rest again.

        ConfigError for a model that cannot. Without torch's re-entrant variant, which wants inputs
        that have gradients.
        """
        if not self.model.supports_gradient_checkpointing:
            raise ConfigError(
                f"train.activation_checkpointing: {type(self.model).__name__} cannot compute its "
                "layers again: set it to false, and train.micro_batch to less to save memory"
            )
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @torch.no_grad()
    def check_head(self, *, name: str, device: torch.device) -> None:
        """ConfigError where the model does more to its logits than our head knows. Collective.

        One forward of 8 tokens each way.
        """
        inputs = forward_inputs(self.model, torch.arange(8)[None], [np.zeros(1)], device=device)
        labels_N = torch.arange(8, device=device)
        was_training = self.training
        self.eval()  # routers may be given noise while they train
        ours = self(labels_N, **inputs).ce_sum
        logits_NV = self(**inputs).logits.reshape(8, -1)[:, : self.head.vocab_size]
        self.train(was_training)
        theirs = nn.functional.cross_entropy(logits_NV.double(), labels_N, reduction="sum")
        if not torch.isclose(ours, theirs, rtol=1e-2):
            raise ConfigError(
                f"{name}: {type(self.model).__name__} makes its logits in a way that our head does "
                f"not know (cross-entropy {theirs:.4f}, ours {ours:.4f}): linear heads are, with "
                "logit_scale, logits_scaling or final_logit_softcapping in config.json"
            )


def replace_head(model: Any, *, vocab_size: int | None = None) -> str:
    """Put a `DistillationHead` in the place of the output projection; its name is returned.

    ConfigError for a model that has none, or that keeps its backbone where we do not find it.
    """
    linear = model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is linear), None)
    if linear is None or not name or backbone(model) is model:
        raise ConfigError(
            f"student.model: {type(model).__name__} has no output projection over its vocabulary: "
            "a causal language model is needed"
        )
    config = model.config
    head = DistillationHead(
        linear, logit_scale=logit_scale(config), softcap=soft_cap(config), vocab_size=vocab_size
    )
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, head)
    return name


def student_settings(config: StudentConfig) -> Any:
    """The model's transformers configuration, without dropout.

    Distillation has targets enough to learn from, and a run without draws is repeated at any number
    of ranks. GPT-2 and its kin come with dropout of 0.1. ConfigError where there is none to be had.
    """
    settings = model_settings(config, key="student.model")
    for name, value in settings.to_dict().items():
        if _DROPOUT.search(name) and isinstance(value, float):
            setattr(settings, name, 0.0)
    # transformers 4 keeps those of an old config.json, and may refuse to save a model that has any.
    sampling = getattr(settings, "_get_non_default_generation_parameters", dict)
    for name in sampling():
        setattr(settings, name, None)
    return settings


def check_fits(settings: Any, *, vocab_size: int, seq_len: int) -> None:
    """ConfigError where the model has fewer ids than the data, or is made for less context."""
    if settings.vocab_size < vocab_size:
        raise ConfigError(
            f"student.model: has {settings.vocab_size} token ids, the cache's teacher and "
            f"tokenizer have {vocab_size}: take a student of the same tokenizer"
        )
    check_seq_len(
        seq_len,
        longest_sequence(settings.to_dict()),
        model="student.model",
        way_out="make a cache of shorter sequences",
    )


def load_student(
    config: StudentConfig,
    mesh: Mesh,
    *,
    deepspeed_config: dict[str, Any],
    seed: int = 0,
    vocab_size: int | None = None,
    features: FeaturePlan | None = None,
    projected_width: int | None = None,
    pack: Pack = "isolate",
) -> Student:
    """The student, its parameters partitioned over all ranks. Collective.

    seed: of random weights. vocab_size: the data's ids. features: to be aligned with the teacher's.
    projected_width: of a teacher whose hidden states are to be projected. pack: of the data. Raises
    ConfigError where the model cannot be loaded.
    """
    import deepspeed

    settings, dtype = student_settings(config), parameter_dtype(deepspeed_config)
    _import_class(settings)
    if mesh.rank == 0:
        log_attention(config, settings, key="student.model")
    whole: list[nn.Module] = []  # rank 0 only; what `first` returns would travel to every rank
    with return_freed_memory():
        mesh.run_on_rank0(lambda: whole.append(_whole(config, settings, dtype, seed)))
        with _no_init_weights(), deepspeed.zero.Init(config_dict_or_path=deepspeed_config):
            model: Any = _from_config(config, settings, dtype)
            alignment = None if features is None else FeatureAlignment(features).to(dtype)
            projector = None
            if projected_width is not None:
                width = settings.get_text_config().hidden_size
                projector = Projector(projected_width, width).to(dtype)
        # Weights that transformers 5 does not fill it does not tie either.
        model.tie_weights()
        _deal(model, whole.pop() if whole else None, mesh, dtype=dtype)
    if alignment is not None:
        _deal_values(alignment, alignment.initial(seed) if mesh.rank == 0 else None)
    if runs_apart(model, pack):
        _check_experts_run_apart(model)
    else:
        gather_experts_together(model)
    return Student(model, vocab_size=vocab_size, alignment=alignment, projector=projector)


def _check_experts_run_apart(model: Any) -> None:
    """ConfigError where experts would have to be gathered together.

    DeepSpeed reduces the gradients of what it gathers together after each of its backward passes:
    documents that run apart take several in a micro-batch. Experts of stacked weights are one
    module, which is gathered as a whole anyway.
    """
    if are_modules_of_their_own(model):
        kind = model.config.get_text_config().model_type
        raise ConfigError(
            f"student.model: {type(model).__name__} ({kind}) carries a state from token to token, "
            "and its experts are modules of their own in this version of transformers: under "
            "data.pack=isolate DeepSpeed cannot train it: install transformers 5, or set "
            "data.pack=concat"
        )


def _import_class(settings: Any) -> None:
    """Import the model's module, which transformers does at first use, before zero.Init is entered.

    That wraps the constructors of all modules and puts back what it saw when they were defined: of
    a module defined inside, what decorated its constructor (transformers 5 does so with experts)
    would be lost, and the next model of the kind would fail. (Not on rank 0, which has made the
    whole model already.)
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)


def parameter_dtype(deepspeed_config: dict[str, Any]) -> torch.dtype:
    """The type of weights and activations that DeepSpeed's configuration asks for."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if deepspeed_config.get(name, {}).get("enabled"):
            return dtype
    return torch.float32


def _whole(config: StudentConfig, settings: Any, dtype: torch.dtype, seed: int) -> nn.Module:
    if config.init == "pretrained":
        return load_pretrained(config, key="student.model", dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _from_config(config, settings, torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _from_config(config: StudentConfig, settings: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        settings,
        dtype=dtype,
        attn_implementation=attention_of(config, settings),
        trust_remote_code=config.trust_remote_code,
    )


def _no_init_weights() -> Any:
    """transformers' own switch; where weights are partitioned, filling them in place fails."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights
    return no_init_weights()


def _deal(model: nn.Module, whole: nn.Module | None, mesh: Mesh, *, dtype: torch.dtype) -> None:
    """Rank 0's weights and buffers into the partitioned model. Collective."""
    _deal_values(model, None if whole is None else dict(whole.named_parameters()))
    # ZeRO's optimizer takes parameters of one dtype only. Its own copies are float32.
    restore(model, whole, mesh, dtype=dtype, parameters=False)


def _deal_values(module: nn.Module, values: Mapping[str, torch.Tensor] | None) -> None:
    """Rank 0's values, None elsewhere, into a module's partitioned parameters. Collective."""
    import deepspeed

    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if values is not None:
                parameter.copy_(values[name])
