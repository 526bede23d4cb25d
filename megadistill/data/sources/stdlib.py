"""The corpus `python-stdlib`: the running interpreter's standard library, without its tests.

About 670 files and 11 MB of real text that every machine has.

The split `validation` is every sixteenth file by a hash of its path, `train` the others.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadistill.config import DataConfig
from megadistill.data.sources.base import Document, Source
from megadistill.errors import DataError
from megadistill.storage.counter_rng import permutation

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SHUFFLE = 3  # purpose of the permutation


class StandardLibrary(Source):
    """The standard library's modules, each one document."""

    def read(self, config: DataConfig, start: int) -> Iterator[Document]:
        """The documents from number `start` on."""
        root, names = _files(config)
        for name in names[start:]:
            with tokenize.open(root / name) as file:  # a few are not UTF-8, and say so
                yield Document(text=file.read())

    def identity(self, config: DataConfig) -> dict[str, Any]:
        """Returns the identity of the corpus, for the recipe."""
        root, names = _files(config)
        digest = hashlib.sha256()
        for name in names:
            content = (root / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return {
            "source": "python-stdlib",
            "split": config.split,
            "python": platform.python_version(),
            "content": digest.hexdigest(),
        }

    def count(self, config: DataConfig) -> int:
        """How many documents there are."""
        return len(_files(config)[1])


STANDARD_LIBRARY = StandardLibrary()


def _files(config: DataConfig) -> tuple[Path, list[str]]:
    if config.split not in ("train", "validation"):
        raise DataError(
            f"data.split: python-stdlib has no split {config.split!r}: set it to train or "
            "validation"
        )
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, found in os.walk(root):
        folders[:] = [f for f in folders if f not in _LEFT_OUT]
        below = Path(folder).relative_to(root)
        names += [(below / f).as_posix() for f in found if f.endswith(".py")]
    names.sort()
    wanted = config.split == "validation"
    names = [n for n in names if (hashlib.sha256(n.encode()).digest()[0] % 16 == 0) == wanted]
    if not names:
        raise DataError(
            f"{root}: holds no Python sources of the standard library: install them, or set "
            "data.files to a corpus of your own"
        )
    if config.shuffle:
        names = [names[i] for i in permutation(len(names), config.seed, _SHUFFLE)]
    return root, names
