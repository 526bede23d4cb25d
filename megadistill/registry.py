"""Registries of what varies: target methods, divergences, data sources, optimizers.

megadistill's own objects are listed by name. Other distributions add theirs through Python entry
points of the group `megadistill`, whose names begin with the kind:

    [project.entry-points.megadistill]
    "divergence.my_divergence" = "my_package:MY_DIVERGENCE"

A configuration then names it as it names one of megadistill's own: `loss.divergence:
my_divergence`. Importing an object by its path in YAML is not supported: a configuration names only
what was installed.

Names are known without importing the object behind them. An entry point is imported when its name
is first used. Imports no torch.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from megadistill.errors import ConfigError, first_line

GROUP = "megadistill"

T = TypeVar("T")


@dataclass(frozen=True)
class Distribution:
    """The installed distribution that registers an object."""

    name: str
    version: str


class Registry(Generic[T]):
    """Objects of one kind by name: megadistill's own, then those of entry points.

    kind  singular, and the prefix of an entry point's name: "method", "divergence", ...
    own   name -> the object, or "module:attribute" to import at first use
    base  the class that an object is an instance of, or "module:attribute"
    """

    def __init__(self, kind: str, own: dict[str, T | str], *, base: type[T] | str) -> None:
        self.kind, self._own, self._base = kind, own, base
        self._loaded: dict[str, T] = {}

    def names(self) -> tuple[str, ...]:
        """All registered names, megadistill's own first. Imports nothing."""
        return (*self._own, *sorted(name for name in self._others() if name not in self._own))

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._others()

    def get(self, name: str, *, key: str = "") -> T:
        """Returns the object. key: the configuration key that names it, for messages.

        Raises ConfigError for a name that is unknown, is registered twice, fails to import, or is
        an object of another class.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name, f"{key}: " if key else "")
        return self._loaded[name]

    def distribution(self, name: str) -> Distribution | None:
        """Returns the distribution that registers the name; None for megadistill's own."""
        if name in self._own or name not in self._others():
            return None
        found = self._others()[name][0].dist
        return Distribution(found.name, found.version) if found is not None else None

    def _others(self) -> dict[str, list[EntryPoint]]:
        prefix = f"{self.kind}."
        others: dict[str, list[EntryPoint]] = {}
        for entry in _entry_points():
            if entry.name.startswith(prefix):
                others.setdefault(entry.name.removeprefix(prefix), []).append(entry)
        return others

    def _load(self, name: str, where: str) -> T:
        others = self._others().get(name, [])
        if name in self._own and others:
            raise ConfigError(
                f"{where}the entry point {others[0].name} of {_origin(others[0])} takes the name "
                f"of megadistill's own {self.kind} {name}: rename the entry point, or uninstall it"
            )
        if len(others) > 1:
            origins = " and ".join(_origin(entry) for entry in others)
            raise ConfigError(
                f"{where}the {self.kind} {name} is registered by {origins}: uninstall one of them"
            )
        if name in self._own:
            return _resolve(self._own[name])
        if not others:
            raise ConfigError(
                f"{where}{name!r} is no {self.kind} that is installed, expected one of "
                f"{', '.join(self.names())}"
            )
        try:
            found = others[0].load()
        except Exception as error:
            raise ConfigError(
                f"{where}the {self.kind} {name} of {_origin(others[0])} cannot be imported from "
                f"{others[0].value}: {type(error).__name__}: {first_line(error)}"
            ) from error
        base: Any = _resolve(self._base)
        if not isinstance(found, base):
            raise ConfigError(
                f"{where}{others[0].value} of {_origin(others[0])} is a "
                f"{type(found).__name__}, expected a {base.__module__}.{base.__name__}"
            )
        return found


@functools.cache
def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _resolve(found: Any) -> Any:
    if not isinstance(found, str):
        return found
    module, _, attribute = found.partition(":")
    return getattr(importlib.import_module(module), attribute)
