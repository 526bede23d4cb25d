"""Arguments of public functions, converted to what the kernels take or refused with ArgumentError.

Numpy arrays and Python lists go to the device of the call's main tensor. A torch tensor on another
device is refused: a hidden copy in each step would cost more than the message.

Shapes: N positions, B sequences, T positions of a sequence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megadistill.errors import ArgumentError, MegadistillError
from megadistill.targets import SparseTargets

Array = npt.NDArray[Any] | torch.Tensor
IGNORED = -100
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
# Sections of the configuration. A caller of a function has no configuration.
_SECTION = re.compile(r"\b(?:loss|targets|student|teacher|data)\.(?=[a-z_]+\b)(?!json|jinja)")


@contextmanager
def in_callers_words() -> Iterator[None]:
    """Raises what the kernels refuse as ArgumentError, without sections of the configuration."""
    try:
        yield
    except ArgumentError:
        raise
    except (MegadistillError, ValueError) as error:
        raise ArgumentError(_SECTION.sub("", str(error))) from error


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """Returns a tensor of the same dtype; arrays that must not be written to are copied."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list | tuple):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise ArgumentError(
            f"{name} is {_kind_of(value)}, expected a torch tensor or a numpy array of numbers"
        )
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def floats(name: str, value: Any) -> torch.Tensor:
    """Returns a tensor of a floating dtype, as it is."""
    tensor = as_tensor(name, value)
    if not tensor.is_floating_point():
        raise ArgumentError(f"{name} is {_dtype(tensor)}, expected a floating dtype")
    return tensor


def rows_of(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Returns the tensor as [N, columns], and the shape of its positions: (N,) or (B, T)."""
    if tensor.ndim not in (2, 3):
        raise ArgumentError(
            f"{name} is {list(tensor.shape)}, expected [N, columns] or [B, T, columns]"
        )
    return tensor.reshape(-1, tensor.shape[-1]), tuple(tensor.shape[:-1])


def integers(
    name: str,
    value: Any,
    *,
    positions: tuple[int, ...],
    columns: tuple[int, ...] = (),
    device: torch.device,
    beside: str,
) -> torch.Tensor:
    """Returns int64 [N, *columns] on `device`, given one row for each position.

    positions: (N,) or (B, T), of the argument that `beside` names. [N] is taken for [B, T], and
    [B, T] for [N] and for [1, N], which is how flash attention packs a batch.
    """
    tensor = as_tensor(name, value)
    if _dtype(tensor) not in _INTEGERS:
        raise ArgumentError(f"{name} is {_dtype(tensor)}, expected integers")
    count, shape = math.prod(positions), tuple(tensor.shape)
    outer = shape[: len(shape) - len(columns)]
    fits = outer in {positions, (count,)} or (
        (len(positions) == 1 or positions[0] == 1) and len(outer) == 2 and math.prod(outer) == count
    )
    if not fits or shape[len(outer) :] != columns:
        expected = [list(positions + columns)]
        if len(positions) > 1:
            expected.append([count, *columns])
        raise ArgumentError(
            f"{name} is {list(shape)}, expected {' or '.join(map(str, expected))}: one row for "
            f"each position of {beside}"
        )
    require_device(name, value, device, beside=beside)
    return tensor.reshape(count, *columns).to(device, torch.int64)


def labels(
    value: Any, *, vocab: int, positions: tuple[int, ...], device: torch.device, beside: str
) -> torch.Tensor:
    """Returns labels_N, int64 [N], each -100 or below `vocab`."""
    labels_N = integers("labels_N", value, positions=positions, device=device, beside=beside)
    wrong_N = (labels_N != IGNORED) & ((labels_N < 0) | (labels_N >= vocab))
    if wrong_N.any():
        found = int(labels_N[wrong_N][0])
        hint = ""
        if found in {2**bits + IGNORED for bits in (8, 16, 32)}:
            hint = ": that is -100 as an unsigned integer, pass signed labels"
        raise ArgumentError(
            f"labels_N holds {found} at position {int(wrong_N.nonzero()[0])}, expected -100 or an "
            f"id of the vocabulary, 0 to {vocab - 1}{hint}"
        )
    return labels_N


def sparse_targets(value: Any) -> SparseTargets:
    """Returns the targets with the dtypes of `SparseTargets`, of the kind that they are."""
    if not isinstance(value, SparseTargets):
        raise ArgumentError(
            f"targets is {_kind_of(value)}, expected SparseTargets, as select_targets and "
            '`cache[i]["targets"]` give them'
        )
    kinds = {"offsets": "i", "ids": "i", "heads": "i", "weights": "f", "tail": "f"}
    changed: dict[str, Any] = {}
    for name, kind in kinds.items():
        field = getattr(value, name)
        if field is None:
            continue
        tensor = as_tensor(f"targets.{name}", field)
        if (_dtype(tensor) in _INTEGERS) != (kind == "i"):
            expected = "integers" if kind == "i" else "a floating dtype"
            raise ArgumentError(f"targets.{name} is {_dtype(tensor)}, expected {expected}")
        tensor = tensor.to(torch.int64 if kind == "i" else torch.float32)
        changed[name] = tensor if isinstance(field, torch.Tensor) else tensor.numpy()
    return replace(value, **changed)


def require_device(name: str, value: Any, device: torch.device, *, beside: str) -> None:
    """ArgumentError for a torch tensor on another device."""
    if isinstance(value, torch.Tensor) and value.device != device:
        raise ArgumentError(
            f"{name} is on {value.device}, {beside} on {device}: pass both on one device"
        )


def number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """ArgumentError for a number out of its bounds. nan is out of all of them."""
    bounds = []
    fits = isinstance(value, int | float | np.number) and math.isfinite(value)
    for bound, words, holds in (
        (above, "more than", fits and above is not None and value > above),
        (least, "at least", fits and least is not None and value >= least),
        (most, "at most", fits and most is not None and value <= most),
        (below, "less than", fits and below is not None and value < below),
    ):
        if bound is not None:
            fits = fits and bool(holds)
            bounds.append(f"{words} {bound:g}")
    if not fits:
        raise ArgumentError(f"{name} is {value!r}, expected a number {' and '.join(bounds)}")


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """Returns an int. ArgumentError for anything but an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ArgumentError(f"{name} is {value!r}, expected an integer of at least {least}")
    return int(value)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind_of(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a numpy array of {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"
