"""Distil large language models from a cache of sparse, unbiased teacher targets.

    cache = megadistill.open_cache("runs/demo/cache")
    student = megadistill.wrap_student(model, cache)
    sampler = megadistill.CacheSampler(cache, global_batch=8, max_steps=100)
    loader = DataLoader(
        megadistill.CacheDataset(cache), batch_sampler=sampler, collate_fn=megadistill.collate
    )
    for batch in loader:
        student(batch).loss.backward()

Names are loaded at first use: `import megadistill` imports neither torch nor streaming.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadistill import workarounds

if TYPE_CHECKING:
    from megadistill.api.cache_batches import Batch, CacheDataset, collate
    from megadistill.api.cache_sampler import CacheSampler
    from megadistill.api.fused_loss import LossOptions, fused_linear_distillation
    from megadistill.api.model_inputs import forward_inputs
    from megadistill.api.selection import decode_targets, encode_targets, select_targets
    from megadistill.api.student_wrapper import StudentOutput, WrappedStudent, wrap_student
    from megadistill.cache.ranking import IdRanking
    from megadistill.cache.reader import Cache, open_cache
    from megadistill.config import Config, load_config
    from megadistill.errors import ArgumentError, MegadistillError
    from megadistill.models.packed_sequences import sample_labels
    from megadistill.targets import SparseTargets

__version__ = "0.1.0"

workarounds.install()

__all__ = [
    "ArgumentError",
    "Batch",
    "Cache",
    "CacheDataset",
    "CacheSampler",
    "Config",
    "IdRanking",
    "LossOptions",
    "MegadistillError",
    "SparseTargets",
    "StudentOutput",
    "WrappedStudent",
    "collate",
    "decode_targets",
    "encode_targets",
    "forward_inputs",
    "fused_linear_distillation",
    "load_config",
    "open_cache",
    "sample_labels",
    "select_targets",
    "wrap_student",
]

_MODULES = {
    "api.cache_batches": ("Batch", "CacheDataset", "collate"),
    "api.cache_sampler": ("CacheSampler",),
    "api.fused_loss": ("LossOptions", "fused_linear_distillation"),
    "api.model_inputs": ("forward_inputs",),
    "api.selection": ("decode_targets", "encode_targets", "select_targets"),
    "api.student_wrapper": ("StudentOutput", "WrappedStudent", "wrap_student"),
    "cache.ranking": ("IdRanking",),
    "cache.reader": ("Cache", "open_cache"),
    "config": ("Config", "load_config"),
    "errors": ("ArgumentError", "MegadistillError"),
    "models.packed_sequences": ("sample_labels",),
    "targets": ("SparseTargets",),
}
_HOME = {name: f"megadistill.{module}" for module, names in _MODULES.items() for name in names}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            import importlib

            value = getattr(importlib.import_module(_HOME[name]), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
