"""Optimizers by name: `train.optimizer` of a configuration.

The objects stand in train/optimizers/, a file each. Another distribution adds an optimizer through
an entry point `optimizer.NAME` of the group `megadistill`, see registry.py. Imports no torch.
"""

from __future__ import annotations

from typing import Any

from megadistill.registry import Registry

OPTIMIZERS: Registry[Any] = Registry(
    "optimizer",
    {"adamw": "megadistill.train.optimizers.adamw:ADAMW"},
    base="megadistill.train.optimizers.optimizer:Optimizer",
)
