"""A model whose weights are made from its mapped files when they are asked for.

transformers converts weights when it loads them. It casts a checkpoint of another dtype, and
transformers 5 stacks experts that are stored one by one. Converted weights cannot stay mapped from
the files, so `from_pretrained` holds such a model whole. `load_deferred` gives its loader tensors
of the meta device that record what is done to them. A parameter that is a view of a file stays
mapped. For any other parameter `values` repeats the recorded operations on the mapped tensors. They
are transformers' own, so the values are the same to the bit.

Memory: a stack of experts takes twice its bytes while it is made. Buffers, and parameters that stay
in float32 beside another dtype (routers, correction biases), are made once and held.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from megadistill.config import TeacherConfig
from megadistill.errors import ConfigError, first_line
from megadistill.models.adapters import find_adapter
from megadistill.models.checkpoint_tensors import check_loaded
from megadistill.models.model_files import find_model
from megadistill.models.pretrained import attention_of, load_pretrained, settings_and_names

log = logging.getLogger(__name__)

_CHANGED_BY_FORWARD = {"rwkv"}  # model types whose forward pass writes into weights of its layers
_DEFERRED = "_megadistill_deferred"  # attribute of a parameter: the Deferred that it stands for
# A row of the result depends on the same row of the input alone.
_BY_ROW = (torch.Tensor.to, torch.Tensor.detach, torch.Tensor.contiguous)
_WRITES = (torch.Tensor.__setitem__, torch.Tensor.data.__set__)  # type: ignore[attr-defined]


class Deferred(torch.Tensor):
    """A tensor of the meta device that records how its values are made.

    source  a tensor of a file, or None for the result of an operation
    recipe  that operation: function, arguments, keyword arguments, and which of its results
    """

    source: torch.Tensor | None = None
    recipe: tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any], int]

    @classmethod
    def of(cls, source: torch.Tensor) -> Deferred:
        found = torch.empty_like(source, device="meta").as_subclass(cls)
        found.source = source
        return found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs `func` on the meta device and records it. NotImplementedError where it writes."""
        del types
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            results = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        name, same = func.__name__, any(results is leaf for leaf in tree_leaves((args, kwargs)))
        if func in _WRITES or (same and name.endswith("_") and name != "requires_grad_"):
            raise NotImplementedError(f"{name} on a tensor whose values are not made yet")
        leaves = tree_leaves(results)
        # Shapes and dtypes are known, and torch.empty_like makes a tensor of its own.
        if same or name.endswith("_like") or not isinstance(leaves[0], torch.Tensor):
            return results
        for number, leaf in enumerate(leaves):
            leaves[number] = leaf.as_subclass(cls)
            leaves[number].recipe = (func, args, kwargs, number)
        return leaves[0] if isinstance(results, torch.Tensor) else type(results)(leaves)

    def values(self, rows: Any = None) -> torch.Tensor:
        """Makes the values on the CPU, or those of some rows (an index of dimension 0)."""
        if self.source is not None:
            return self.source if rows is None else self.source[rows]
        func, args, kwargs, number = self.recipe
        by_row = func in _BY_ROW or (func is torch.Tensor.__getitem__ and args[1] is Ellipsis)
        inner = rows if by_row else None

        def made(leaf: Any) -> Any:
            return leaf.values(inner) if isinstance(leaf, Deferred) else leaf

        found = tree_leaves(func(*tree_map(made, args), **tree_map(made, kwargs)))[number]
        return found if by_row or rows is None else found[rows]


def values(tensor: torch.Tensor, rows: Any = None) -> torch.Tensor:
    """Returns the values of a parameter or buffer of a model, made now if they are deferred.

    rows: an index of dimension 0, for the values of some rows.
    """
    deferred = getattr(tensor, _DEFERRED, None)
    if deferred is not None:
        return deferred.values(rows)
    return tensor.data if rows is None else tensor.data[rows]


def is_deferred(model: nn.Module) -> bool:
    """Whether `model` has parameters whose values are made when they are asked for."""
    return any(hasattr(parameter, _DEFERRED) for parameter in model.parameters())


def load_deferred(config: TeacherConfig, *, key: str, dtype: torch.dtype) -> Any:
    """The model of `load_pretrained`, without the weights that would have to be converted.

    Parameters of NaN that take no memory stand in their place; `values` makes theirs. Adapters,
    which are merged into a whole model, models that may run code of their own, and models whose
    files are not on this machine are loaded whole. So is a model whose loader does what cannot be
    recorded: writing into tensors, or looking at their values.
    """
    try:
        tensors = _mapped_tensors(config, key=key)
        if tensors is not None:
            return _load(config, tensors, key=key, dtype=dtype)
    except (ConfigError, NotImplementedError) as error:
        log.info(
            "%s: %s: the model to compare with is loaded whole into host memory: %s",
            key,
            config.model,
            first_line(error),
        )
    return load_pretrained(config, key=key, dtype=dtype)


def _mapped_tensors(config: TeacherConfig, *, key: str) -> dict[str, torch.Tensor] | None:
    """The tensors in a model's files, mapped; None for a model that is to be loaded whole."""
    from safetensors.torch import load_file

    if config.trust_remote_code or find_adapter(config.model, key=key) is not None:
        return None
    model = find_model(config.model, key=key, revision=config.revision, fetch=False)
    files = model.weights()
    if not files or model.incomplete_weights() or model.get("model_type") in _CHANGED_BY_FORWARD:
        return None
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _load(
    config: TeacherConfig, tensors: Mapping[str, torch.Tensor], *, key: str, dtype: torch.dtype
) -> Any:
    from transformers import AutoModelForCausalLM

    settings, names = settings_and_names(config, key=key)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(settings))
    leaves = {name: Deferred.of(tensor) for name, tensor in tensors.items()}
    model, report = kind.from_pretrained(
        None,
        config=settings,
        state_dict=dict(leaves),
        dtype=dtype,
        attn_implementation=attention_of(config, settings),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        key_mapping=names,
    )
    check_loaded(model, report, name=str(config.model), key=key)
    mapped = {leaf.untyped_storage()._cdata for leaf in leaves.values()}
    made: dict[torch.Tensor, torch.Tensor] = {}  # a tied parameter stays one
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if isinstance(tensor, Deferred):
                    if tensor not in made:
                        free = tensor.untyped_storage()._cdata in mapped
                        held = tensor.dtype == torch.float32 != dtype
                        made[tensor] = _in_model(tensor, now=free or held)
                    own[name] = made[tensor]
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise NotImplementedError("a tensor without values")
    return model


def _in_model(tensor: Deferred, *, now: bool) -> torch.Tensor:
    """The buffer or parameter for `tensor`; a parameter has its values only with `now`."""
    if not isinstance(tensor, nn.Parameter):
        return tensor.values()
    if now:
        return nn.Parameter(tensor.values(), requires_grad=False)
    value = float("nan") if tensor.dtype.is_floating_point else 0
    stand_in = torch.full((1,), value, dtype=tensor.dtype).expand(tensor.shape)
    parameter = nn.Parameter(stand_in, requires_grad=False)
    setattr(parameter, _DEFERRED, tensor)
    return parameter


def _on_meta(argument: Any) -> Any:
    """An argument of an operation, with the meta device for the CPU."""
    if isinstance(argument, str):
        return "meta" if argument == "cpu" else argument
    return torch.device("meta") if isinstance(argument, torch.device) else argument
