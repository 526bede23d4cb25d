"""The layers of a model, and hooks that capture the outputs of chosen layers.

For aligning a student's features with its teacher's. Chosen outputs are caught by hooks on the
layers themselves: transformers' own `output_hidden_states` returns every layer's, of a teacher of
80 layers some 20 GB a micro-batch where one or two are wanted.

Layers are numbered from 1, the first, to L, the last, or from -1, the last, to -L.

Shapes: B sequences, T positions, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megadistill.errors import ConfigError


@dataclass(frozen=True)
class Seen:
    """Outputs of the watched layers, by layer.

    hidden     [B, T, H]: the layer's output, before any norm that follows the last
    attention  [B, heads, T, T]: the weights with which each position (third) attends to others
    """

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, torch.Tensor] = field(default_factory=dict)


@contextlib.contextmanager
def watched(
    model: nn.Module, *, hidden: Sequence[int] = (), attention: Sequence[int] = ()
) -> Iterator[Seen]:
    """Captures the outputs of these layers, 1 to L, of forward passes of `model` inside.

    Hooks are put last, after DeepSpeed's own, and taken away again, so that what a backward pass
    computes again is not caught. ConfigError where attention weights are not to be had.
    """
    seen, layers = Seen(), decoder_layers(model) if hidden or attention else nn.ModuleList()
    hooks = [
        layers[number - 1].register_forward_hook(_keep_hidden(seen.hidden, number))
        for number in hidden
    ]
    hooks += [
        _attention_of(layers[number - 1]).register_forward_hook(
            _keep_weights(seen.attention, number)
        )
        for number in attention
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def listed_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the members of all lists of modules in `model`, also of lists inside of layers."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [layer for each in lists for layer in each]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of a transformer's layers. ConfigError for a model that keeps none."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    found = next(lists, None)
    if found is None:
        raise ConfigError(
            f"features: {type(model).__name__} has no list of its {count} layers: set "
            "loss.hidden_weight=0 and loss.attention_weight=0, or use another architecture"
        )
    return found


def layer_pairs(
    pairs: Sequence[tuple[int, int]], *, teacher: int, student: int, key: str
) -> list[tuple[int, int]]:
    """The [teacher's, student's] layers of a configuration, numbered from 1.

    teacher, student: how many layers each has. ConfigError, naming `key`, for one that is none.
    """
    for number, pair in enumerate(pairs):
        for who, layer, count in zip(("teacher", "student"), pair, (teacher, student), strict=True):
            if not 1 <= abs(layer) <= count:
                raise ConfigError(
                    f"{key}.{number}: the {who} has {count} layers, found {layer}: expected 1 to "
                    f"{count}, or -1, the last, to {-count}"
                )
    return [(t if t > 0 else teacher + 1 + t, s if s > 0 else student + 1 + s) for t, s in pairs]


def _attention_of(layer: nn.Module) -> nn.Module:
    found = next((m for m in layer.modules() if type(m).__name__.endswith("Attention")), None)
    if found is None:
        raise ConfigError(
            f"features.attention_layers: {type(layer).__name__} has no attention: choose another "
            "layer, or set loss.attention_weight=0"
        )
    return found


def _keep_hidden(place: dict[int, torch.Tensor], number: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        place[number] = output[0] if isinstance(output, tuple) else output

    return hook


def _keep_weights(place: dict[int, torch.Tensor], number: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, torch.Tensor) or weights.dim() != 4:
            raise ConfigError(
                f"features.attention_layers: {type(module).__name__} gives no attention weights: "
                "set teacher.attention=eager and student.attention=eager, or "
                "loss.attention_weight=0"
            )
        place[number] = weights

    return hook
