"""Faults to plant in a model: changes that an engine could make without failing.

Each takes a backbone of transformers, plain or under an engine, and changes it in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Fault = Callable[[Any], None]


def layers_of(core: Any) -> Any:
    return getattr(core, "layers", None) or core.h


def rounded_tables(core: Any) -> None:
    """Rotary frequencies in bfloat16, as a cast of all buffers leaves them."""
    for name, buffer in core.named_buffers():
        if "inv_freq" in name:
            buffer.copy_(buffer.bfloat16())


def another_rope_base(core: Any) -> None:
    for name, buffer in core.named_buffers():
        if "inv_freq" in name:
            buffer.mul_(buffer / buffer.max() * 0.1 + 0.9)


def no_rope_scaling(core: Any) -> None:
    """The frequencies of plain rope in place of the scaled ones."""
    config = core.config
    parameters = getattr(config, "rope_parameters", None) or {}
    base = parameters.get("rope_theta", getattr(config, "rope_theta", 10_000.0))
    for name, buffer in core.named_buffers():
        if "inv_freq" in name:
            count = len(buffer)
            buffer.copy_(base ** (-torch.arange(count, device=buffer.device) / count))


def window_off_by_one(core: Any) -> None:
    core.config.sliding_window -= 1


def no_window(core: Any) -> None:
    core.config.sliding_window = 1 << 20


def no_attention_cap(core: Any) -> None:
    for layer in layers_of(core):
        layer.self_attn.attn_logit_softcapping = None


def scale_left_out(core: Any) -> None:
    for layer in layers_of(core):
        layer.self_attn.scaling *= 1.5


def bias_lost(core: Any) -> None:
    layers_of(core)[0].self_attn.q_proj.bias.data.zero_()


def layer_twice(core: Any) -> None:
    layers = layers_of(core)
    for kept, lost in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        lost.data.copy_(kept.data)


def norm_left_out(core: Any) -> None:
    layers_of(core)[-1].input_layernorm.weight.data.fill_(1.5)


def scale_slightly_off(core: Any) -> None:
    """Little more than rounding: attention that is 13 % too sharp."""
    for layer in layers_of(core):
        layer.self_attn.scaling *= 1.13


def shard_missing(core: Any) -> None:
    """Half of a projection's inputs are not summed."""
    weight = layers_of(core)[0].mlp.down_proj.weight.data
    weight[:, : weight.shape[1] // 2] = 0


def shard_doubled(core: Any) -> None:
    layers_of(core)[0].mlp.down_proj.weight.data.mul_(2)


def expert_missing(core: Any) -> None:
    _expert_weight(core)[0] = 0


def expert_doubled(core: Any) -> None:
    _expert_weight(core)[0] *= 2


def _expert_weight(core: Any) -> torch.Tensor:
    layer = layers_of(core)[0]
    block = getattr(layer, "block_sparse_moe", None) or layer.mlp
    experts = block.experts
    if hasattr(experts, "down_proj"):
        return experts.down_proj.data  # [E, ...]
    return [e.down_proj.weight.data for e in experts]  # type: ignore[return-value]


def position_off_by_one_late(core: Any) -> None:
    """From the last quarter on, positions are one too high."""

    def shifted(module: Any, args: Any, kwargs: Any) -> Any:
        positions = kwargs.get("position_ids")
        if positions is None:
            return None
        late = positions.clone()
        late[:, 3 * positions.shape[1] // 4 :] += 1
        return args, kwargs | {"position_ids": late}

    core.register_forward_pre_hook(shifted, with_kwargs=True)


def leak_late(core: Any) -> None:
    """Documents in the last quarter of the sequence are taken for one."""

    def joined(module: Any, args: Any, kwargs: Any) -> Any:
        positions = kwargs["position_ids"].clone()
        T = positions.shape[1]
        first = 3 * T // 4
        late = positions[:, first:]
        positions[:, first:] = late[:, :1] + torch.arange(T - first, device=late.device)
        return args, kwargs | {"position_ids": positions}

    core.register_forward_pre_hook(joined, with_kwargs=True)


def leak_in_one_layer(core: Any) -> None:
    """One layer attends to all positions before, also those of other documents."""

    def causal(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"attention_mask": None}

    layers_of(core)[1].register_forward_pre_hook(causal, with_kwargs=True)


def state_left_over(core: Any) -> None:
    """A recurrent layer goes on from where its last forward pass ended."""
    mixer = layers_of(core)[0].mamba
    forward, left_over = mixer.forward, []

    def going_on(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        before = [last.expand(len(hidden_states), -1, -1) for last in left_over]
        left_over[:] = [hidden_states[:1, -8:].clone()]
        out = forward(torch.cat([*before, hidden_states], 1), **kwargs | {"attention_mask": None})
        return out[:, -hidden_states.shape[1] :]

    mixer.forward = going_on
