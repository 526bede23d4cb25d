"""Recipes: everything a store's bytes depend on. Two runs of one recipe write the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megadistill.errors import RecipeError


def differences(left: Any, right: Any, *, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, left, right) of each field in which two recipes differ, by name."""
    if isinstance(left, dict) and isinstance(right, dict):
        # What both have comes first: another method says more than a parameter of one of them.
        lonely = left.keys() ^ right.keys()
        for key in sorted(left.keys() | right.keys(), key=lambda key: (key in lonely, key)):
            dotted = f"{name}.{key}" if name else str(key)
            yield from differences(left.get(key), right.get(key), name=dotted)
        return
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        left, right = list(left), list(right)
    # True == 1 and 1 == 1.0 in Python; in a recipe they are different settings.
    if type(left) is not type(right) or left != right:
        yield name, left, right


def first_difference(left: Any, right: Any) -> tuple[str, Any, Any] | None:
    """The first of `differences`."""
    return next(differences(left, right), None)


def shown_differences(different: list[tuple[str, Any, Any]]) -> str:
    """Differences for a log line: "name left -> right", by comma."""
    return ", ".join(f"{n} {_shown(left)} -> {_shown(right)}" for n, left, right in different)


def require_same_recipe(
    ours: dict[str, Any], theirs: dict[str, Any], *, file: str, other: str, way_out: str
) -> None:
    """RecipeError naming the field, both values and the way out, unless the recipes are equal."""
    found = first_difference(ours, theirs)
    if found:
        field, left, right = found
        raise RecipeError(f"{file}: {field} is {_shown(left)}, {other} {_shown(right)}: {way_out}")


def _shown(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
