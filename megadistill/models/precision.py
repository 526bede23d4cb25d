"""Restores what a model keeps in float32 beside weights of bfloat16 or float16.

transformers keeps rotary frequencies, correction biases, and in some models routers or norms in
float32, whatever dtype a model is loaded in. A rotary frequency rounded to bfloat16 is wrong by
whole turns at position 2,000, and a rounded router chooses other experts. ZeRO-3 makes a model in
one dtype: `deepspeed.zero.Init` casts each tensor that a constructor creates. `restore` puts in
what plain transformers has.

Cost: parameters in float32 take twice the bytes. They are partitioned as the others are.
"""

from __future__ import annotations

import torch
from torch import nn

from megadistill.parallel import Mesh


def kept_parameters(plain: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters that a model of transformers, loaded in `dtype`, has in float32."""
    if dtype == torch.float32:
        return {}
    return {n: p.detach() for n, p in plain.named_parameters() if p.dtype == torch.float32}


def restore(
    model: nn.Module,
    plain: nn.Module | None,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    parameters: bool = True,
) -> None:
    """Gives `model`, whose parameters ZeRO-3 partitions, the float32 tensors of `plain`.

    plain: the same model as transformers loads it in `dtype`; rank 0's is used. parameters: False
    leaves parameters alone; buffers are always taken. Collective over all ranks.
    """
    import deepspeed

    kept = {} if plain is None or not parameters else kept_parameters(plain, dtype)
    for name in mesh.broadcast(list(kept)):
        parameter = model.get_parameter(name)
        _widen(parameter)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if mesh.rank == 0:
                parameter.copy_(kept[name])
    buffers = {} if plain is None else {n: b.cpu() for n, b in plain.named_buffers()}
    for name, buffer in mesh.broadcast(buffers).items():
        parent, _, attribute = name.rpartition(".")
        model.get_submodule(parent)._buffers[attribute] = buffer.to(mesh.device)


def _widen(parameter: nn.Parameter) -> None:
    """Makes a partitioned parameter one of float32. DeepSpeed gathers each dtype apart."""
    part = parameter.ds_tensor  # type: ignore[attr-defined]
    pinned = part.is_pinned()
    part.data = part.data.float().pin_memory() if pinned else part.data.float()
    parameter.data = parameter.data.float()
