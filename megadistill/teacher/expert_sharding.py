"""Shards a mixture of experts over the tensor-parallel group, by width, before AutoTP runs.

AutoTP shards `nn.Linear`. transformers 5 keeps a block's experts as stacked parameters
(`experts.gate_up_proj`, `experts.down_proj`), and gpt-oss and Llama 4 do so in transformers 4 too;
AutoTP leaves these whole on every rank. Here each rank keeps its columns of every expert's
intermediate dimension, of gate and up alike. An all-reduce adds the ranks' partial sums of the
routed experts. Routers stay whole, and shared experts are AutoTP's. Lists of modules, as
transformers 4 has them, hold `nn.Linear` and are AutoTP's as well.

By width rather than by expert: every rank has the same work whatever the routers choose, and 1/tp
of the bytes for any number of experts. Cost: one all-reduce of [N, H] a block, in the run's dtype,
as AutoTP has for a dense mlp. transformers stacks a checkpoint's experts while it loads them;
`cut_while_loading` cuts each stack as soon as it is made, so that a rank holds its slices and one
whole stack.

Shape letters: N positions, H hidden size, E experts, I intermediate size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megadistill.errors import TeacherError
from megadistill.models.experts import expert_blocks

_GRAIN = 16  # columns; grouped matrix products on GPUs want rows of whole 16 bytes


@dataclass(frozen=True)
class Layout:
    """How a block stacks its experts.

    gate_up     [E, 2I, H], or with `transposed` [E, H, 2I]; without `gated`, up [E, I, H] alone
    down        [E, H, I], or [E, I, H]
    interleaved gate and up alternate along 2I; else all of gate comes before all of up
    """

    transposed: bool = False
    interleaved: bool = False
    gated: bool = True


# Classes without transformers' own description of their layout.
_UNDESCRIBED = {
    "Llama4TextExperts": Layout(transposed=True),
    "GptOssExperts": Layout(transposed=True, interleaved=True),  # in transformers 4
}


def shard_experts(model: nn.Module, *, rank: int, ranks: int, group: Any) -> None:
    """Cuts `model`'s stacked experts, and attention sinks, to the slices of one rank.

    TeacherError for experts that are stacked in a way that is not known.
    """
    if ranks == 1:
        return
    for name, experts in stacked_experts(model):
        layout = layout_of(experts)
        if layout is None:
            raise TeacherError(
                f"teacher.tp: {ranks}: the experts of {type(model).__name__} ({name}, a "
                f"{type(experts).__name__}) are stacked in an unknown way, and cannot be sharded: "
                "use teacher.engine=zero3 with teacher.tp=1, which runs the model's own modules"
            )
        for parameter_name, parameter in list(experts.named_parameters(recurse=False)):
            if parameter_name not in _cut_already(experts):
                part = _part(parameter_name, parameter, layout, rank=rank, ranks=ranks)
                setattr(experts, parameter_name, part)
        experts.register_forward_hook(_AddUp(group))
    for router in routers(model):
        # AutoTP would cut a router that is a linear layer. It passes by what AutoEP manages.
        router._is_autoep_layer = True  # type: ignore[assignment]
    for module in model.modules():
        sinks = module._parameters.get("sinks")
        if sinks is not None and sinks.ndim == 1:  # one value a head
            heads = slice(*columns(len(sinks), rank=rank, ranks=ranks, grain=1))
            module.sinks = _parameter(sinks.data[heads])


@contextlib.contextmanager
def cut_while_loading(*, rank: int, ranks: int) -> Iterator[None]:
    """Inside, experts that are put into a model are cut to the slices of one rank.

    `shard_experts` has to follow.
    """
    if ranks == 1:
        yield
        return
    put = nn.Module.__setattr__

    def cut_and_put(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and not value.is_meta and _holds_experts("", module):
            layout = layout_of(module)
            if layout is not None and name not in _cut_already(module):
                part = _part(name, value, layout, rank=rank, ranks=ranks)
                part.__dict__.update(value.__dict__)  # that it is loaded, and not to be initialised
                _cut_already(module).add(name)
                value = part
        put(module, name, value)

    nn.Module.__setattr__ = cut_and_put  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = put  # type: ignore[method-assign]


def _cut_already(experts: nn.Module) -> set[str]:
    """Names of the parameters that `cut_while_loading` has cut."""
    return experts.__dict__.setdefault("_cut_while_loading", set())


def stacked_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the modules that hold several experts in one parameter."""
    for name, module in model.named_modules():
        if _holds_experts(name, module):
            yield name, module


def _holds_experts(name: str, module: nn.Module) -> bool:
    named = "Expert" in type(module).__name__ or name.rpartition(".")[2] == "experts"
    own = (p for p in module._parameters.values() if p is not None)
    return named and not isinstance(module, nn.Linear) and any(p.ndim > 1 for p in own)


def layout_of(experts: nn.Module) -> Layout | None:
    """None where it is not known."""
    gated = getattr(experts, "has_gate", "gate_up_proj" in experts._parameters)
    expected = {"gate_up_proj" if gated else "up_proj", "down_proj"}
    found = {name.removesuffix("_bias") for name in experts._parameters}
    if found != expected or getattr(experts, "has_post_expert_norm", False):
        return None
    if hasattr(experts, "is_transposed"):
        return Layout(experts.is_transposed, not experts.is_concatenated, gated)  # type: ignore[arg-type]
    return _UNDESCRIBED.get(type(experts).__name__)


def routers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that give each expert, or the shared one, its weight."""
    for block in expert_blocks(model):
        for name, child in block.named_children():
            if name in ("gate", "router", "shared_expert_gate", "shared_experts_gate"):
                yield child


def columns(size: int, *, rank: int, ranks: int, grain: int = _GRAIN) -> tuple[int, int]:
    """(first, last + 1) of a rank's slice of `size`, whole grains where they divide evenly."""
    if size % (grain * ranks):
        grain = 1
    units = size // grain
    return grain * (units * rank // ranks), grain * (units * (rank + 1) // ranks)


def _part(name: str, whole: torch.Tensor, layout: Layout, *, rank: int, ranks: int) -> nn.Parameter:
    """Returns one rank's slice of a parameter."""
    if name == "down_proj_bias":  # added up it must count once
        return _parameter(whole.data if rank == 0 else torch.zeros_like(whole.data))
    down = name == "down_proj"
    if name.endswith("_bias"):
        dimension = 1
    else:
        dimension = 1 if layout.transposed == down else 2
    size = whole.shape[dimension] // (2 if layout.gated and not down else 1)
    first, last = columns(size, rank=rank, ranks=ranks)
    if down:
        return _parameter(whole.data.narrow(dimension, first, last - first))
    return _parameter(_halves(whole.data, dimension, layout, first, last))


def _halves(
    tensor: torch.Tensor, dimension: int, layout: Layout, first: int, last: int
) -> torch.Tensor:
    """Columns first to last of gate, and the same of up."""
    if not layout.gated:
        return tensor.narrow(dimension, first, last - first)
    if layout.interleaved:
        return tensor.narrow(dimension, 2 * first, 2 * (last - first))
    halves = tensor.unflatten(dimension, (2, -1)).narrow(dimension + 1, first, last - first)
    return halves.flatten(dimension, dimension + 1)


def _parameter(values: torch.Tensor) -> nn.Parameter:
    """A copy, so that the whole tensor can go."""
    return nn.Parameter(values.clone(memory_format=torch.contiguous_format), requires_grad=False)


class _AddUp:
    """A forward hook: the sum over the group of what each rank's slices of the experts gave."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, module: nn.Module, inputs: Any, output_NH: torch.Tensor) -> torch.Tensor:
        del module, inputs
        output_NH = output_NH.contiguous()
        dist.all_reduce(output_NH, group=self.group)
        return output_NH
