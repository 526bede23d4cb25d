"""Optimizers of the student: one object each, found by name.

`config/optimizer_registry.py` lists the names. A new one here is a file and a line there; of
another distribution it is an entry point and touches nothing here.
"""

from megadistill.train.optimizers.optimizer import (
    Optimizer,
    chosen_optimizer,
    parameter_groups,
    require_same_ranks,
)

__all__ = ["Optimizer", "chosen_optimizer", "parameter_groups", "require_same_ranks"]
