"""Whether this machine can do what the `deepspeed` section asks for, before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megadistill.errors import ConfigError


def check_machine(deepspeed: Mapping[str, Any]) -> None:
    """ConfigError for a number format or an offload that this machine does not have.

    deepspeed: the section of the configuration.
    """
    _check_precision(deepspeed)
    _check_nvme(deepspeed)


def _check_precision(deepspeed: Mapping[str, Any]) -> None:
    asked = {n: bool((deepspeed.get(n) or {}).get("enabled")) for n in ("bf16", "fp16")}
    if asked["fp16"] and not torch.cuda.is_available():
        raise ConfigError(
            "deepspeed.fp16.enabled: true, and there is no GPU here, expected one: float16 with "
            "its loss scaler is for GPUs; set deepspeed.fp16.enabled=false and "
            "deepspeed.bf16.enabled=true, or leave both out for float32"
        )
    if asked["bf16"] and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"deepspeed.bf16.enabled: true, and {torch.cuda.get_device_name()} has no bfloat16: "
            "set deepspeed.bf16.enabled=false and deepspeed.fp16.enabled=true"
        )


def _check_nvme(deepspeed: Mapping[str, Any]) -> None:
    zero = deepspeed.get("zero_optimization") or {}
    if (zero.get("offload_param") or {}).get("device") == "nvme" and not _has_async_io():
        raise ConfigError(
            "deepspeed.zero_optimization.offload_param.device: nvme, and DeepSpeed cannot build "
            "its async_io operator here: install libaio's headers (libaio-dev) and a C++ compiler, "
            "or set it to cpu"
        )


def _has_async_io() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))
