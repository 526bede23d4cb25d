"""Distributions of others that register objects with megadistill, made in a folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadistill import registry
from megadistill.config.optimizer_registry import OPTIMIZERS
from megadistill.targets import DIVERGENCES, METHODS, find_method


def make_distribution(
    folder: Path,
    name: str,
    entry_points: dict[str, str],
    *,
    version: str = "1.0",
    module: str | None = None,
) -> Path:
    """Metadata as pip leaves it.

    entry_points: name -> "module:attribute", of the group `megadistill`. module: the text of a
    module of the distribution's own name.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = "".join(f"{left} = {right}\n" for left, right in entry_points.items())
    (info / "entry_points.txt").write_text(f"[megadistill]\n{lines}")
    if module is not None:
        (folder / f"{name.replace('-', '_')}.py").write_text(module)
    return folder


@contextmanager
def installed(*folders: Path) -> Iterator[None]:
    """The distributions in `folders` are installed in this process, and gone afterwards."""
    before, paths = set(sys.modules), [str(folder) for folder in folders]
    sys.path[:0] = paths
    _forget()
    try:
        yield
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(tuple(paths)):
                del sys.modules[name]
        _forget()


def _forget() -> None:
    importlib.invalidate_caches()
    registry._entry_points.cache_clear()
    find_method.cache_clear()
    for each in (METHODS, DIVERGENCES, OPTIMIZERS):
        each._loaded.clear()
