"""Whether a checkpoint supplies every tensor that its model needs.

transformers initialises what a checkpoint lacks at random and continues. A teacher or student with
one random layer runs, and nothing later can tell. `check_tensors` finds out before anything is
loaded: transformers' own loader runs on tensors of the meta device that have the names and shapes
in the checkpoint's headers, so that prefixes, renamed and stacked weights and declared ties follow
the loader's rules. No weights are read and no memory is taken. `check_loaded` looks at the report
of a real load, for models whose files were not on this machine before.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from megadistill.config import StudentConfig, TeacherConfig
from megadistill.errors import ConfigError, first_line
from megadistill.models.checkpoint_files import TensorHeader

log = logging.getLogger(__name__)

_SHOWN = 3  # tensor names per message


def check_tensors(
    section: TeacherConfig | StudentConfig,
    settings: Any,
    tensors: Mapping[str, TensorHeader],
    *,
    key: str,
    names: dict[str, str] | None = None,
) -> Any:
    """Returns the model of `settings`, empty. ConfigError where `tensors` are not those it needs.

    settings: the model's transformers configuration. key: where the configuration names the model,
    for messages. names: patterns of `pretrained.settings_and_names`. Logs once which tensors of the
    checkpoint the model does not use. None for a model whose own code does not run on meta.
    """
    found = {
        name: torch.empty(tensor.shape, dtype=torch.float32, device="meta")
        for name, tensor in tensors.items()
    }
    try:
        empty, report = _loaded(section, settings, found, names)
    except Exception as error:
        if section.trust_remote_code:  # its code may not run on the meta device: loading will tell
            log.debug("%s: %s: not checked before it is loaded: %s", key, section.model, error)
            return None
        raise ConfigError(
            f"{key}: {section.model}: transformers cannot make the model of its config.json, or "
            f"load its tensors ({type(error).__name__}: {first_line(error)})"
        ) from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_loaded(empty, report, name=str(section.model), key=key, shapes=shapes)
    unused = sorted(report["unexpected_keys"])
    if unused:
        log.info(
            "%s: %s: tensors that the model does not use: %s", key, section.model, _some(unused)
        )
    return empty


def _loaded(
    section: TeacherConfig | StudentConfig,
    settings: Any,
    tensors: dict[str, torch.Tensor],
    names: dict[str, str] | None,
) -> tuple[Any, dict[str, Any]]:
    """The model without weights, and the report of loading `tensors`, which are on meta."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), _silent():
        empty = AutoModelForCausalLM.from_config(
            settings, trust_remote_code=section.trust_remote_code
        )
        _, report = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=tensors,
            device_map="meta",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            key_mapping=names,
        )
    return empty, report


def check_loaded(
    model: nn.Module,
    report: Mapping[str, Any],
    *,
    name: str,
    key: str,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Raises ConfigError, a line for each kind, where a checkpoint and `model` do not agree.

    report: what from_pretrained returns with output_loading_info. shapes: of the tensors in the
    checkpoint, where they are known.
    """
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    # transformers 5 gives the shapes as well.
    mismatched = sorted(m if isinstance(m, str) else m[0] for m in report["mismatched_keys"])
    lines = []
    if missing:
        lines.append(f"lacks {_some(missing)}, which would be random{_renamed(missing, unused)}")
    if mismatched:
        lines.append(_other_shapes(model, mismatched, shapes or {}))
    lost = _of_modules_that_exist(model, unused)
    if lost and not missing:
        lines.append(
            f"has {_some(lost)}, which the model of its config.json does not: correct config.json "
            "(number of layers, biases)"
        )
    if lines:
        raise ConfigError("\n".join(f"{key}: {name} {line}" for line in lines))


def _renamed(missing: Collection[str], unused: Collection[str]) -> str:
    """Returns the way out, with the names under which the checkpoint may have the tensors."""
    other = ": copy it again, or save it with save_pretrained from a complete model"
    for wanted in missing:
        for found in unused:
            if found.endswith("." + wanted):
                prefix = found.removesuffix(wanted)
                return f"; it has {found}: save it without the prefix {prefix}"
            if wanted.endswith("." + found):
                return f"; it has {found}: save it with save_pretrained of the whole model"
    return f"; it has {_some(unused)}, which the model does not know{other}" if unused else other


def _other_shapes(model: nn.Module, names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shown = [
        f"{name} has shape {list(shapes[name])}, expected {list(expected[name])}"
        if name in shapes and name in expected
        else f"{name} has another shape than config.json gives it"
        for name in names[:_SHOWN]
    ]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    if any(0 in shapes.get(name, ()) for name in names):
        way_out = (
            "an empty tensor is what ZeRO-3 leaves where weights are saved without being gathered: "
            "convert the DeepSpeed checkpoint with zero_to_fp32.py"
        )
    else:
        way_out = "config.json and weights are of different models: copy both again"
    return f"does not fit its config.json: {'; '.join(shown)}{more}: {way_out}"


def _of_modules_that_exist(model: nn.Module, unused: Collection[str]) -> list[str]:
    """Unused tensors of modules that the model has, and those of whole layers beyond its last.

    A bias that config.json forgets, or its last layers, change what a model says. Heads for other
    purposes (multi-token prediction, values, vision) stand beside the model and do not.
    """
    modules = dict(model.named_modules())
    suffixes = {_in_layer(name) for name in model.state_dict()}
    # A layer for another purpose has tensors of its own beside those of an ordinary layer.
    other = {_layer_of(name)[:2] for name in unused if _in_layer(name) not in suffixes}
    lost = []
    for name in unused:
        parent = modules.get(name.rpartition(".")[0])
        if parent is not None and next(parent.children(), None) is None:
            lost.append(name)
        layers, number, _ = _layer_of(name)
        known = modules.get(layers)
        if isinstance(known, nn.ModuleList) and int(number) >= len(known):
            lost += [name] if (layers, number) not in other else []
    return lost


def _layer_of(name: str) -> tuple[str, str, str]:
    """("model.layers", "3", "mlp.up_proj.weight"); empty strings outside of numbered layers."""
    match = re.match(r"(.*?)\.(\d+)\.(.+)", name)
    return (match[1], match[2], match[3]) if match else ("", "", name)


def _in_layer(name: str) -> tuple[str, str]:
    layers, _, rest = _layer_of(name)
    return layers, rest


def _some(names: Collection[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more tensors" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """transformers prints its own report as a table; the same is in the error."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
