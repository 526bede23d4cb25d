"""The weight files of a model's folder, chosen as transformers chooses them, and their headers.

`AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)` loads model.safetensors, or
without it the files that model.safetensors.index.json lists. Other safetensors files in the folder
(adapters, consolidated.safetensors, shards without an index) are not part of the model. Whatever
reads, counts or hashes weights goes by `weight_files`. Imports no torch.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.errors import ConfigError, first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 1 << 28  # bytes; a safetensors header has about 100 bytes per tensor


@dataclass(frozen=True)
class TensorHeader:
    """A tensor in a safetensors file: its dtype as safetensors names it (BF16), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def weight_files(folder: Path, settings: dict[str, Any]) -> list[Path]:
    """Returns the safetensors files that transformers loads from `folder`, sorted by name.

    Files that an index lists are returned even where they are missing. Empty if there is neither
    model.safetensors nor an index. settings: config.json, which can name another file in
    `transformers_weights`. ConfigError for an index that cannot be read.
    """
    chosen = settings.get("transformers_weights")
    if chosen is None:
        chosen = SINGLE if (folder / SINGLE).is_file() else INDEX
    path = folder / str(chosen)
    if not path.name.endswith(".index.json"):
        return [path] if path.is_file() else []
    return [folder / name for name in _indexed(path)] if path.is_file() else []


def ignored_files(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Returns the names of safetensors files in `folder` that transformers does not load."""
    loaded = set(weight_files(folder, settings))
    found = [path for path in folder.glob("*.safetensors") if path.is_file()]
    return sorted(path.name for path in found if path not in loaded)


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Returns the tensors of a safetensors file by name. ConfigError if the header is damaged."""
    return _read(file)[0]


def missing_end(file: Path) -> tuple[int, int] | None:
    """Returns (size, expected size) in bytes of a truncated safetensors file, else None."""
    expected, size = _read(file)[1], file.stat().st_size
    return (size, expected) if size < expected else None


def _indexed(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{index}: cannot be read ({type(error).__name__}: {first_line(error)}), expected "
            "an object with a weight_map: copy or download it again"
        ) from None
    outside = next((n for n in names if not isinstance(n, str) or Path(n).name != n), None)
    if outside is not None or not names:
        found = "is empty" if outside is None else f"names {outside!r}"
        raise ConfigError(
            f"{index}: its weight_map {found}, expected names of files beside it: copy or download "
            "it again"
        )
    return names


def _read(file: Path) -> tuple[dict[str, TensorHeader], int]:
    """The tensors, and the number of bytes that the file has by its header."""
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            size = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            text = stream.read(size) if size <= _MAX_HEADER else b""
        header = json.loads(text)
        tensors, end = {}, 0
        for name, tensor in header.items():
            if name != "__metadata__":
                shape = tuple(int(n) for n in tensor["shape"])
                tensors[name] = TensorHeader(str(tensor["dtype"]), shape)
                end = max(end, int(tensor["data_offsets"][1]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{file}: not a safetensors file, its header cannot be read "
            f"({type(error).__name__}: {first_line(error)}): copy or download it again"
        ) from None
    return tensors, 8 + size + end
