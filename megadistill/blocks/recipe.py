"""Recipes: everything a store's bytes depend on. Two runs of one recipe write the same bytes.

A store knows fields, and a user knows the keys of a configuration: `Keys` translates, so that a
refusal names what the user changed. Whoever opens a store hands it in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megadistill.errors import RecipeError

NAMES = "names"  # of the header: what teacher and data are called, for reading only
# What follows from the recipe, and says nothing new where a field of it differs.
_FOLLOWS = ("columns", "ids_bin")


@dataclass(frozen=True)
class Keys:
    """How the fields of a header are called in the configuration.

    of       a dotted field, such as `recipe.tau`, to its key
    way_out  what to do about a difference
    """

    of: Callable[[str], str] = str
    way_out: str = "restore the setting, or choose another folder"


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
    ours: dict[str, Any],
    theirs: dict[str, Any],
    *,
    file: str,
    other: str,
    way_out: str = "",
    keys: Keys | None = None,
    names: tuple[dict[str, str], dict[str, str]] = ({}, {}),
) -> None:
    """RecipeError, a line for each key that differs, unless the recipes are equal.

    names: what models and data are called on either side, by key.
    """
    keys = keys or Keys(way_out=way_out)
    found = list(differences(ours, theirs))
    if [each for each in found if each[0] == "kind"]:
        found = [each for each in found if each[0] == "kind"]
    shown = [each for each in found if each[0].partition(".")[0] not in _FOLLOWS] or found
    lines: dict[str, str] = {}
    for field, left, right in shown:
        key = keys.of(field)
        if key in lines:
            continue
        left, right = (
            _named(key, value, called) for value, called in zip((left, right), names, strict=True)
        )
        lines[key] = f"{file}: {key} is {left}, {other} {right}: {keys.way_out}"
    if lines:
        raise RecipeError("\n".join(lines.values()))


def _named(key: str, value: Any, names: dict[str, str]) -> str:
    called = names.get(key)
    return _shown(value) if called is None else f"{called} ({_shown(value)})"


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = repr(value)
    if isinstance(value, str) and len(value) >= 32 and set(value) <= set("0123456789abcdef"):
        return value[:16]  # a hash
    return text if len(text) <= 120 else f"{text[:117]}..."
