"""The teacher: a transformers model under DeepSpeed, giving hidden states, and its head.

Stands between the tokens and the targets. The backbone runs in DeepSpeed, the head is ours
(`teacher/chunked_head.py`): both of DeepSpeed's ways to shard an output projection end in logits of
[N, V] on every rank.

Two engines. `tensor_parallel` is DeepSpeed's inference engine with AutoTP; `InferenceEngine` rather
than `initialize`, because it keeps no training state. Its group has to be handed over explicitly,
as `mpu` and as `tp_group`: alone it takes ranks 0 to tp-1 for the group of every rank. And its
grain of 64 columns leaves ranks without columns on small models, so it is set to 1.
`zero3` partitions the weights over all ranks and gathers them a layer at a time: forwards are
collective, so all ranks must call `hidden` equally often. Experts are gathered together: which of
them a rank calls depends on its tokens, and ranks that gather different ones would wait for ever.

No rank holds a whole model. Weights are mapped from the files, and each rank copies its share, a
module (tensor_parallel) or a parameter (zero3) at a time. Loading 3.2 GB of a Llama on two ranks
took 1.5 GB of memory on each under tensor_parallel and 1.8 GB under zero3, two layers at work and a
copy of the head included. A checkpoint in another type than `teacher.dtype` has to be converted:
tensor_parallel then holds it whole in host memory while it loads.

Before either answers anything it is compared with the model itself (`teacher/verification.py`).

Shape letters: B sequences, T positions, N = B*T, H hidden size.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megadistill.config import Config, TeacherConfig
from megadistill.errors import ConfigError, TeacherError, first_line
from megadistill.models.adapters import changed_modules, find_adapter
from megadistill.models.attention import Pack, forward_inputs
from megadistill.models.documents_apart import (
    DocumentsApart,
    carries_state,
    gather_layers_together,
    log_apart,
    runs_apart,
)
from megadistill.models.experts import gather_experts_together
from megadistill.models.host_memory import return_freed_memory
from megadistill.models.layers import listed_layers
from megadistill.models.precision import restore
from megadistill.models.pretrained import backbone, load_pretrained, log_attention, model_settings
from megadistill.parallel import Mesh
from megadistill.teacher.chunked_head import TeacherHead, check_head
from megadistill.teacher.expert_sharding import cut_while_loading, shard_experts
from megadistill.teacher.verification import Verification, sharding_errors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """A teacher ready to be asked.

    lockstep: every rank must call `hidden` equally often. apart: documents are run one by one.
    """

    engine: Any
    head: TeacherHead
    device: torch.device
    pack: Pack
    lockstep: bool
    apart: bool = False

    @contextlib.contextmanager
    def on_device(self, *, offload: bool) -> Iterator[None]:
        """Inside, the weights are on the device; with `offload` they are in host memory outside.

        The head stays: whole distributions are made of it when the student steps.
        """
        if not offload or self.lockstep:  # ZeRO-3 fetches a layer at a time, by itself
            yield
            return
        self.engine.module.to(self.device)
        try:
            yield
        finally:
            self.engine.module.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # what the student is to have

    @torch.no_grad()
    def hidden(self, tokens_BT: np.ndarray, documents: Sequence[np.ndarray]) -> torch.Tensor:
        """[N, H]: the last hidden states of B sequences, position after position.

        tokens_BT: integer ids. documents: the starts of the documents within each sequence.
        """
        if self.apart:
            apart = DocumentsApart.of(tokens_BT, documents, device=self.device)
            return apart.run(self.engine, lockstep=self.lockstep).last_hidden_state.flatten(0, 1)
        inputs = forward_inputs(
            self.engine.module, tokens_BT, documents, pack=self.pack, device=self.device
        )
        return self.engine(**inputs).last_hidden_state.flatten(0, 1)


def load_teacher(
    config: Config,
    mesh: Mesh,
    *,
    vocab_size: int,
    whole_head: bool = False,
    key: str = "teacher.model",
) -> Teacher:
    """The configured teacher on this rank's share of the mesh. Collective over all ranks.

    vocab_size: ids that its distributions are over, see `TeacherHead.of`. whole_head: every rank
    has all of the head's rows, so that it can make whole distributions of hidden states by itself.
    key: where the configuration names the model, for messages.
    Raises ConfigError when the model cannot be loaded, or run in its dtype on this machine.
    TeacherError when it has no head, or says something else under its engine than by itself.
    """
    check_dtype(config.teacher, key=key)
    zero3 = config.teacher.engine == "zero3"
    build = _zero3 if zero3 else _tensor_parallel
    with return_freed_memory():
        with _quiet():
            # An adapter is merged into whole experts.
            whole = zero3 or find_adapter(config.teacher.model, key=key) is not None
            with cut_while_loading(rank=mesh.tp_rank, ranks=1 if whole else mesh.tp):
                model = _pretrained(config.teacher, partition=zero3, key=key)
            verification = Verification(
                config.teacher,
                mesh,
                key=key,
                seq_len=config.data.seq_len,
                vocab_size=min(vocab_size, model.get_output_embeddings().out_features),
            )
            if zero3:
                _deal_merged(config.teacher, model, verification.plain, mesh, key=key)
                restore(model, verification.plain, mesh, dtype=getattr(torch, config.teacher.dtype))
            with sharding_errors(model, mesh):
                engine, head = build(config.teacher, mesh, model, vocab_size, whole_head)
        teacher = Teacher(
            engine=engine,
            head=head,
            device=mesh.device,
            pack=config.data.pack,
            lockstep=zero3,
            apart=runs_apart(model, config.data.pack),
        )
        if mesh.rank == 0:
            log_attention(config.teacher, model.config, key=key)
            log_apart(model, config.data.pack, key=key)
        _verify(teacher, model, verification, mesh)
    return teacher


def check_dtype(config: TeacherConfig, *, key: str) -> None:
    """ConfigError for a dtype in which DeepSpeed does not run on this machine.

    key: where the configuration names the teacher's model.
    """
    if config.dtype == "float32":
        return  # which every accelerator has
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = [str(dtype).removeprefix("torch.") for dtype in accelerator.supported_dtypes()]
    if config.dtype not in supported:
        raise ConfigError(
            f"{key.removesuffix('model')}dtype: {config.dtype}, and DeepSpeed does not run it on "
            f"this machine's {accelerator.device_name()}, expected {' or '.join(supported)}"
        )


def _deal_merged(config: TeacherConfig, model: Any, merged: Any, mesh: Mesh, *, key: str) -> None:
    """The weights that an adapter changes, from rank 0's merged model into the partitioned base."""
    import deepspeed

    adapter = find_adapter(config.model, key=key)
    for module in [] if adapter is None else changed_modules(adapter):
        for name, parameter in model.get_submodule(module).named_parameters(prefix=module):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if mesh.rank == 0:
                    parameter.data.copy_(merged.get_parameter(name).data)


def _verify(teacher: Teacher, model: Any, verification: Verification, mesh: Mesh) -> None:
    """TeacherError where engine and head say something else than the model. Collective."""
    over = False
    while not over:
        probe = verification.probe
        alone_TH = packed_TH = None
        if verification.compares or teacher.lockstep:
            with sharding_errors(model, mesh):
                alone_TH = teacher.hidden(probe.tokens_T[None], [np.zeros(1, np.int64)])
                if teacher.pack == "isolate":
                    packed_TH = teacher.hidden(probe.packed_T[None], [probe.starts])
        over = verification.compare(teacher.head, alone_TH, packed_TH)


def _tensor_parallel(
    config: TeacherConfig, mesh: Mesh, model: Any, vocab_size: int, whole_head: bool
) -> tuple[Any, TeacherHead]:
    rank, ranks = (0, 1) if whole_head else (mesh.tp_rank, mesh.tp)
    head = TeacherHead.of(
        model,
        rank=rank,
        ranks=ranks,
        group=mesh.tp_group,
        device=mesh.device,
        vocab_size=vocab_size,
    )
    settings = {
        "dtype": getattr(torch, config.dtype),
        "replace_with_kernel_inject": False,
        "tensor_parallel": {
            "tp_size": mesh.tp,
            "tp_grain_size": 1,
            "mpu": _Groups(mesh),
            "tp_group": mesh.tp_group,
        },
    }
    shard_experts(model, rank=mesh.tp_rank, ranks=mesh.tp, group=mesh.tp_group)
    engine = _inference_engine(backbone(model), settings)
    return engine, head


def _inference_engine(module: nn.Module, settings: dict[str, Any]) -> Any:
    """Returns the engine of `deepspeed.init_inference`, for a module that has its dtypes already.

    DeepSpeed would cast every parameter and buffer to the run's dtype. Rotary frequencies in
    bfloat16 are wrong by whole turns at position 2,000, and routers that a model keeps in float32
    choose other experts.
    """
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.inference.engine import InferenceEngine

    class Engine(InferenceEngine):
        def _convert_to_dtype(self, config: Any) -> None:
            del config

    return Engine(module, config=DeepSpeedInferenceConfig(**settings))


def _zero3(
    config: TeacherConfig, mesh: Mesh, model: Any, vocab_size: int, whole_head: bool
) -> tuple[Any, TeacherHead]:
    import deepspeed

    del whole_head  # it always is

    output = model.get_output_embeddings()
    parameters = [p for p in (output.weight, getattr(output, "bias", None)) if p is not None]
    with deepspeed.zero.GatheredParameters(parameters):
        head = TeacherHead.of(
            model, rank=0, ranks=1, group=None, device=mesh.device, vocab_size=vocab_size
        )
    gather_experts_together(model)
    if carries_state(vars(model.config.get_text_config())):
        gather_layers_together(model)
    settings = _zero3_settings(config)
    settings["zero_optimization"] |= _one_layer_ahead(model)
    engine, *_ = deepspeed.initialize(model=backbone(model), config=settings)
    engine.eval()
    return engine, head


def _one_layer_ahead(model: Any) -> dict[str, int]:
    """How much of a model that ZeRO-3 holds is whole at a time: the layer at work, and the next.

    DeepSpeed's own limit, a billion parameters, was most of a model of 1.3 billion.
    """
    sizes = [
        sum(getattr(p, "ds_numel", p.numel()) for p in layer.parameters())
        for layer in listed_layers(model)
    ]
    largest = max(sizes, default=0)
    return {
        "stage3_max_live_parameters": 2 * largest,
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_reuse_distance": 0,  # a layer comes once in a forward pass
    }


def _zero3_settings(config: TeacherConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3}
    if config.offload is not None:
        zero["offload_param"] = {"device": config.offload, "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "zero_optimization": zero,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "fp16": {"enabled": config.dtype == "float16"},
    }


def _pretrained(config: TeacherConfig, *, partition: bool, key: str) -> Any:
    """The model, on each rank whole, or partitioned over all ranks."""
    from transformers.integrations import HfDeepSpeedConfig

    # While this object lives, from_pretrained partitions each weight as it reads it.
    alive = HfDeepSpeedConfig(_zero3_settings(config)) if partition else None
    dtype = getattr(torch, config.dtype)
    try:
        model = load_pretrained(config, key=key, dtype=dtype, merged=not partition)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        if not partition or isinstance(error, torch.OutOfMemoryError | dist.DistError):
            raise
        kind = model_settings(config, key=key).model_type
        raise TeacherError(
            f"{key}: {config.model} (model_type {kind}) cannot be partitioned by ZeRO-3 "
            f"({type(error).__name__}: {first_line(error)}): set "
            "teacher.engine=tensor_parallel"
        ) from error
    del alive
    check_head(model)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Groups:
    """The mesh in the words that DeepSpeed asks for (Megatron's `mpu`)."""

    mesh: Mesh

    def get_model_parallel_group(self) -> Any:
        return self.mesh.tp_group

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tp

    def get_data_parallel_group(self) -> Any:
        return self.mesh.dp_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """AutoTP prints its findings on every rank; they are for the log of whoever asks for them."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield
    if said.getvalue().strip() and os.environ.get("RANK", "0") == "0":
        log.debug("DeepSpeed: %s", " ".join(said.getvalue().split()))
