"""The type of a configuration key that takes the name of a registered object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megadistill.config.suggest import closest
from megadistill.errors import ConfigError
from megadistill.registry import Registry


class Registered:
    """Annotation: text that is a name in `registry`.

    find  returns the object of a name, or raises ConfigError, which becomes a mistake of the key
    """

    def __init__(self, registry: Registry[Any], find: Callable[[str], object]) -> None:
        self.registry, self._find = registry, find

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._registered, handler(source))

    def _registered(self, name: str) -> str:
        if name not in self.registry:
            names = self.registry.names()
            raise PydanticCustomError(
                "registered_name",
                "expected one of {expected}",
                {"expected": ", ".join(names), "near": closest(name, names)},
            )
        try:
            self._find(name)
        except ConfigError as error:
            raise PydanticCustomError("not_usable", "{said}", {"said": str(error)}) from error
        return name
