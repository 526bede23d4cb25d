"""Memory of the models a rank, and disk of the training run. Worked out, not measured.

training  16 bytes a parameter for weights, gradients and Adam, 18 in bfloat16, whose gradients are
          added in float32, and 4 for a moving average; activations 34 bytes a token, layer and
          hidden unit in 16 bits (arXiv 2205.05198, without the attention matrix), twice that in 32;
          with activation checkpointing 2 of them, a layer's input, and the 34 of one layer. What is
          offloaded to the host does not count
teacher   the weights of the rank (shares.py), 16 live values a token and hidden unit, and the
          chunk of the head
"""

from __future__ import annotations

from typing import Any

from megadistill.config import Config
from megadistill.models.model_files import ModelFiles
from megadistill.preflight.plan.shares import (
    WIDTH,
    at_work_bytes,
    tensor_parallel_bytes,
    zero3_bytes,
)

HEAD_CHUNK = 256 << 20  # bytes of logits that the teacher's head works on at a time, about


def teacher_memory(config: Config, model: ModelFiles | None, world: int) -> int | None:
    """Bytes a rank to generate on `world` ranks; None where the model's size is not known."""
    weights = None if model is None else teacher_weights(config, model, world)
    if model is None or weights is None or not model.hidden_size:
        return None
    tokens = config.teacher.micro_batch * config.data.seq_len
    return weights + tokens * model.hidden_size * 16 * WIDTH[config.teacher.dtype] + HEAD_CHUNK


def at_once(sizes: list[tuple[Config, int]]) -> int:
    """Returns the bytes that several teachers, each of its own configuration, take together.

    Those in host memory are on the device one after the other.
    """
    resident = sum(size for config, size in sizes if not config.teacher.offload)
    return resident + max((size for config, size in sizes if config.teacher.offload), default=0)


def teacher_weights(config: Config, model: ModelFiles, world: int) -> int | None:
    """Bytes a rank of the teacher's weights alone, under zero3 with the layers at work.

    Counted in the headers of its files, else estimated from config.json. None where that does not
    tell.
    """
    zero3 = config.teacher.engine == "zero3"
    if zero3 and (counted := zero3_bytes(config, model, world)) is not None:
        whole, spread = counted
        at_work = at_work_bytes(config, model) or 0
        return whole + at_work - (spread if config.teacher.offload else 0)
    if not zero3 and (share := tensor_parallel_bytes(config, model)) is not None:
        return share
    found = model.parameters()
    if found is None or not model.layers:
        return None
    size = found[0] * WIDTH[config.teacher.dtype]
    if not zero3:
        return size // config.teacher.tp
    return (0 if config.teacher.offload else size // world) + 2 * size // model.layers


def student_memory(config: Config, model: ModelFiles | None, world: int) -> int | None:
    """Bytes a rank to train on `world` ranks; None where the model's size is not known."""
    states = student_states(config, model, world)
    if model is None or states is None or not model.hidden_size or not model.layers:
        return None
    width = 2 if _half_precision(config.deepspeed) else 4
    tokens = config.train.micro_batch * config.data.seq_len
    again = config.train.activation_checkpointing
    values = model.layers + 17 if again else 17 * model.layers  # of a token and hidden unit
    return states + tokens * model.hidden_size * values * width


def student_states(config: Config, model: ModelFiles | None, world: int) -> int | None:
    """Bytes a rank of all but the activations; None where the model's size is not known."""
    found = None if model is None else model.parameters()
    if model is None or found is None or not model.layers:
        return None
    parameters, width = found[0], 2 if _half_precision(config.deepspeed) else 4
    zero = config.deepspeed.get("zero_optimization") or {}
    stage = int(zero.get("stage", 3))
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    elsewhere = (zero.get("offload_param") or {}).get("device", "none") != "none"
    weights = 0 if elsewhere else parameters * width // (world if stage >= 3 else 1)
    bfloat16 = (config.deepspeed.get("bf16") or {}).get("enabled")
    gradients = parameters * (4 if bfloat16 else width) // (world if stage >= 2 else 1)
    states = parameters * (12 if width == 2 else 8) // (world if stage >= 1 else 1)
    gathered = 2 * parameters * width // model.layers if stage >= 3 else 0
    average = 4 * parameters // world if config.train.ema else 0
    return weights + gradients + (0 if offloaded else states) + average + gathered


def _half_precision(deepspeed: dict[str, Any]) -> bool:
    return any((deepspeed.get(name) or {}).get("enabled") for name in ("bf16", "fp16"))


def run_bytes(config: Config, model: ModelFiles | None) -> int | None:
    """Checkpoints (one more than are kept, while it is written) and the exported models.

    While a model is exported its weights lie there twice, where that checkpoint was.
    """
    found = None if model is None else model.parameters()
    if found is None:
        return None
    train, width = config.train, 2 if _half_precision(config.deepspeed) else 4
    checkpoints, models = train.keep + 1 + train.keep_best, 1 + train.keep_best
    one = (14 if width == 2 else 12) + (4 if train.ema else 0)
    return found[0] * (checkpoints * one + models * width)
