"""Divergences between teacher and student: one object each, found by name.

`targets/divergence_registry.py` lists the names. A new one here is a file and a line there; of
another distribution it is an entry point and touches nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megadistill.student.loss.divergences.divergence import (
    Buckets,
    ChosenDivergence,
    Divergence,
    Terms,
    choose,
)
from megadistill.targets.divergence_registry import DIVERGENCES

__all__ = ["Buckets", "ChosenDivergence", "Divergence", "Terms", "divergence_of"]


def divergence_of(
    name: str,
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    head_mass: float = 0.5,
    options: Mapping[str, Any] | None = None,
) -> ChosenDivergence:
    """The registered divergence with its parameters, see `choose`.

    ConfigError for a name that is not registered, for an entry point that cannot be imported, and
    for options that it does not take.
    """
    kind: Divergence = DIVERGENCES.get(name, key="loss.divergence")
    own = {}
    if DIVERGENCES.distribution(name) is None:
        own = {"beta": beta, "alpha": alpha, "head_mass": head_mass}
    return choose(name, kind, own, options or {})
