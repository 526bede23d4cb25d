"""DeepSpeed's own keys, as the `deepspeed` section may use them.

DeepSpeed passes over an unknown top-level key in silence, and takes some keys that would work
against ours. So the section is checked here against our own lists. They follow DeepSpeed 0.19.8; a
test compares them with what the installed DeepSpeed really reads. Importing this costs no torch.

What was tried before it was refused, with DeepSpeed 0.19.8, ZeRO-3 and 2 ranks:

checkpoint.writer  Without `decoupled` every file is whole when save_checkpoint returns, so nothing
    is in the background. With it no file is there yet; DeepSpeed waits for them at the end of the
    next step, so that at most one step passes meanwhile. A save whose writing process has died
    returns without an error and without a file. The writer needs CROSS_SIZE, which DeepSpeed's
    launcher alone sets (torchrun and plain python end in a KeyError), and its default type the
    async_io operator. train/checkpoint/background.py does it for any launcher and number of steps,
    and seals.
compile            DeepSpeed reads it and compiles nothing until engine.compile() is called. Called
    (torch 2.13, float32, a CPU) the hooks with which ZeRO-3 gathers weights break the graph at
    every module, and dynamo reaches its limit of recompilations on them. A Llama of 2 layers, 1 and
    2 ranks: compiled in 60 to 130 s, losses of the first steps equal to 6 digits. One of 4 layers,
    384 wide, 1,024 positions: with aot_eager equal losses at 0.96 s a step against 1.04 to 1.6 s
    as it is; with inductor 1.35 to 1.42 s, losses 1e-5 apart after a step and 2 % after 13. So no
    gain was seen, and not the same losses. On a GPU it is untried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megadistill.config.suggest import did_you_mean

# A key's value: a type's name, several of them with |, or a mapping of keys in its turn.
_OFFLOAD = {
    "device": "none|cpu|nvme",
    "nvme_path": "text",
    "buffer_count": "int",
    "pin_memory": "bool",
}
ZERO_OPTIMIZATION: dict[str, Any] = {
    "stage": "0|1|2|3",
    "allgather_bucket_size": "int",
    "allgather_partitions": "bool",
    "allgather_sequential": "bool",
    "compute_grad_norm": "bool",
    "contiguous_gradients": "bool",
    "enable_sanity_checks": "bool",
    "gather_16bit_weights_on_model_save": "bool",
    "ignore_unused_parameters": "bool",
    "leaf_module": {"classes": "list", "names": "list", "name_suffixes": "list"},
    "legacy_stage1": "bool",
    "load_from_fp32_weights": "bool",
    "log_trace_cache_warnings": "bool",
    "max_live_parameters": "int",
    "max_reuse_distance": "int",
    "memory_efficient_linear": "bool",
    "model_persistence_threshold": "int",
    "module_granularity_threshold": "int",
    "offload_optimizer": _OFFLOAD
    | {
        "pipeline_read": "bool",
        "pipeline_write": "bool",
        "fast_init": "bool",
        "ratio": "number",
        "super_offload": "bool",
        "cpuadam_cores_perc": "number",
    },
    "offload_param": _OFFLOAD | {"buffer_size": "int", "max_in_cpu": "int"},
    "overlap_comm": "bool",
    "override_module_apply": "bool",
    "param_persistence_threshold": "int",
    "parameter_alignment": "bool",
    "pipeline_loading_checkpoint": "bool",
    "prefetch_bucket_size": "int",
    "reduce_bucket_size": "int",
    "reduce_scatter": "bool",
    "round_robin_gradients": "bool",
    "save_muon_momentum_buffer_in_memory": "bool",
    "stage3_allgather_sequential": "bool",
    "stage3_gather_16bit_weights_on_model_save": "bool",
    "stage3_max_live_parameters": "int",
    "stage3_max_reuse_distance": "int",
    "stage3_model_persistence_threshold": "int",
    "stage3_module_granularity_threshold": "int",
    "stage3_param_persistence_threshold": "int",
    "stage3_prefetch_bucket_size": "int",
    "stage3_use_all_reduce_for_fetch_params": "bool",
    "sub_group_size": "int",
    "use_all_reduce_for_fetch_params": "bool",
    "use_multi_rank_bucket_allreduce": "bool",
    "zenflow": "mapping",
    "zero_hpz_partition_size": "int",
    "zero_quantized_gradients": "bool",
    "zero_quantized_nontrainable_weights": "bool",
    "zero_quantized_weights": "bool",
}
BF16: dict[str, Any] = {
    "enabled": "bool",
    "bf16_master_weights_and_grads": "bool",
    "bf16_optimizer_states": "bool",
    "check_grad_overflow": "bool",
    "immediate_grad_update": "bool",
}
FP16: dict[str, Any] = {
    "enabled": "bool",
    "auto_cast": "bool",
    "consecutive_hysteresis": "bool",
    "fp16_master_weights_and_grads": "bool",
    "hysteresis": "int",
    "initial_scale_power": "int",
    "loss_scale": "number",
    "loss_scale_window": "int",
    "min_loss_scale": "int",
}
ALLOWED: dict[str, Any] = {
    "activation_checkpointing": "mapping",
    "aio": "mapping",
    "bf16": BF16,
    "checkpoint": "mapping",
    "comet": "mapping",
    "comms_logger": "mapping",
    "communication_data_type": "text",
    "csv_monitor": "mapping",
    "data_types": "mapping",
    "disable_allgather": "bool",
    "disable_python_gc": "bool",
    "dump_state": "bool",
    "flops_profiler": "mapping",
    "fp16": FP16,
    "log_level": "text",
    "memory_breakdown": "bool",
    "seq_parallel_communication_data_type": "text",
    "steps_per_print": "int",
    "tensorboard": "mapping",
    "timers": "mapping",
    "torch_autocast": "mapping",
    "vocabulary_size": "int",
    "wall_clock_breakdown": "bool",
    "wandb": "mapping",
    "zero_allow_untested_optimizer": "bool",
    "zero_force_ds_cpu_optimizer": "bool",
    "zero_optimization": ZERO_OPTIMIZATION,
}

_BATCH = "train.global_batch and train.micro_batch say it, at every number of ranks"
_LOSS = "the loss is divided by the global batch's number of valid positions, once and by us"
_ORDER = "the order of the sequences is the order section's"
_UNUSED = "nothing here uses it"
_BACKGROUND = "set train.save_in_background=true, which seals a checkpoint when it is whole"
REFUSED: dict[str, str] = {
    "autotuning": _BATCH,
    "bfloat16": "it is DeepSpeed's old name: write bf16",
    "compile": "nothing is compiled: under ZeRO-3 graphs break at every module; leave it out",
    "data_efficiency": _ORDER,
    "dataloader_drop_last": _ORDER,
    "datastates_ckpt": _BACKGROUND,
    "expert_parallel": _UNUSED,
    "gradient_accumulation_steps": _BATCH,
    "gradient_allreduce_op": _LOSS,
    "gradient_clipping": "set train.grad_clip",
    "gradient_predivide_factor": _LOSS,
    "hybrid_engine": _UNUSED,
    "managed_gradient_accumulation": _BATCH,
    "optimizer": "set train.lr, train.betas and train.weight_decay",
    "pipeline": _UNUSED,
    "prescale_gradients": _LOSS,
    "scheduler": "set train.schedule, train.warmup_steps and train.min_lr_ratio",
    "sequence_parallel_size": _UNUSED,
    "tensor_parallel": "teacher.tp shards the teacher; the student is spread by zero_optimization",
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "use_data_before_expert_parallelism": _UNUSED,
    "weight_quantization": _UNUSED,
}
REMOVED = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
)
_TORCH_ADAM = "it works with DeepSpeed's own CPU Adam alone, and the optimizer here is torch's"
_REFUSED_INSIDE: dict[tuple[str, ...], str] = {
    ("bf16", "bf16_master_weights_and_grads"): _TORCH_ADAM,
    ("bf16", "bf16_optimizer_states"): _TORCH_ADAM,
    ("fp16", "fp16_master_weights_and_grads"): _TORCH_ADAM,
    ("zero_optimization", "offload_optimizer", "cpuadam_cores_perc"): _TORCH_ADAM,
    ("zero_optimization", "offload_optimizer", "ratio"): _TORCH_ADAM,
    ("zero_optimization", "offload_optimizer", "super_offload"): _TORCH_ADAM,
    ("zero_optimization", "zenflow"): _TORCH_ADAM,
    ("checkpoint", "load_universal"): "train.py converts checkpoints by itself",
    ("checkpoint", "writer"): _BACKGROUND,
    ("zero_optimization", "elastic_checkpoint"): "train.py converts checkpoints by itself",
    ("zero_optimization", "cpu_offload"): "write offload_optimizer: {device: cpu}",
    ("zero_optimization", "cpu_offload_param"): "write offload_param: {device: cpu}",
    ("zero_optimization", "cpu_offload_use_pin_memory"): "write offload_optimizer.pin_memory",
    ("zero_optimization", "stage3_gather_fp16_weights_on_model_save"): "write "
    "stage3_gather_16bit_weights_on_model_save",
}
_TYPES: dict[str, tuple[str, Any]] = {
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    # 5e8 is how DeepSpeed's own documents write a bucket size.
    "int": ("a whole number", lambda v: _is_number(v) and v == int(v)),
    "number": ("a number", lambda v: _is_number(v)),
    "text": ("text", lambda v: isinstance(v, str)),
    "list": ("a list", lambda v: isinstance(v, list)),
    "mapping": ("a mapping", lambda v: isinstance(v, Mapping)),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def deepspeed_problems(section: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path within the section, message) for everything wrong with it."""
    for key, value in section.items():
        if key in REFUSED:
            yield (key,), f"is not yours to set here: {REFUSED[key]}"
        elif key in REMOVED:
            yield (key,), "DeepSpeed has removed it: leave it out"
        else:
            yield from _check((), key, value, ALLOWED)
    on = [
        name
        for name in ("bf16", "fp16", "torch_autocast")
        if isinstance(section.get(name), Mapping) and section[name].get("enabled") is True
    ]
    if len(on) > 1:
        yield (on[1], "enabled"), f"{' and '.join(on)} are both enabled: keep one"


def _check(
    path: tuple[str, ...], key: str, value: Any, known: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], str]]:
    here = (*path, key)
    if here in _REFUSED_INSIDE:
        yield here, f"is not yours to set here: {_REFUSED_INSIDE[here]}"
        return
    if key not in known:
        prefix = ".".join(("deepspeed", *path))
        yield here, f"unknown key{did_you_mean(str(key), known, prefix=prefix)}"
        return
    if value == "auto":
        yield here, "'auto' is filled in by transformers' Trainer, not here: leave the key out"
        return
    kind = known[key]
    if value is None:
        return
    if isinstance(kind, Mapping):
        if not isinstance(value, Mapping):
            yield here, f"expected a mapping of {', '.join(list(kind)[:3])} ..., found {value!r}"
            return
        for inner, inner_value in value.items():
            yield from _check(here, inner, inner_value, kind)
    elif kind in _TYPES:
        expected, fits = _TYPES[kind]
        if not fits(value):
            yield here, f"expected {expected}, found {value!r}"
        elif kind == "mapping":
            for inner in value:
                if (*here, inner) in _REFUSED_INSIDE:
                    yield from _check(here, inner, value[inner], {})
    elif str(value) not in kind.split("|"):
        yield here, f"expected one of {', '.join(kind.split('|'))}, found {value!r}"
