"""megadistill: distil large language models from a cache of sparse, unbiased teacher targets."""

from __future__ import annotations

from typing import Any

from megadistill import workarounds

__version__ = "0.1.0"

workarounds.install()

# Loaded on first use, so that `import megadistill` costs neither torch nor streaming.
_EXPORTS = {
    "SparseTargets": "megadistill.targets",
    "select_targets": "megadistill.teacher.select",
    "encode_targets": "megadistill.cache.codec",
    "decode_targets": "megadistill.cache.codec",
    "open_cache": "megadistill.cache.reader",
    "fused_linear_distillation": "megadistill.student.head",
    "load_config": "megadistill.config",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
