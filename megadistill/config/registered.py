"""Types of keys that name a registered object: a method, a divergence, an optimizer.

Names come from the registry without importing what they stand for, so that a configuration is read
without torch and without other distributions' modules. An object that costs no torch may be looked
up at once, so that one that cannot be imported is a mistake of its key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

from megadistill.errors import ConfigError
from megadistill.registry import Registry


@dataclass(frozen=True)
class RegisteredName:
    """Validates a name of `registry`, for `pydantic.AfterValidator`.

    find: returns the object of a name, or raises ConfigError; None: only the name is looked at.
    """

    registry: Registry[Any]
    find: Callable[[str], object] | None = None

    def __call__(self, name: str) -> str:
        if name not in self.registry:
            # messages.py writes it as it writes a Literal's error.
            expected = ", ".join(self.registry.names())
            raise PydanticCustomError(
                "literal_error", "expected one of {expected}", {"expected": expected}
            )
        if self.find is not None:
            try:
                self.find(name)
            except ConfigError as error:
                raise PydanticCustomError("not_usable", "{said}", {"said": str(error)}) from error
        return name

    @property
    def own(self) -> list[str]:
        """megadistill's own names: a reference must not vary with what else is installed."""
        registry = self.registry
        return [name for name in registry.names() if registry.distribution(name) is None]
