"""Mistakes found by several checks, reported at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megadistill.config import Config
from megadistill.errors import ConfigError, MegadistillError
from megadistill.models.model_files import ModelFiles


class Mistakes:
    """The mistakes so far, one line each; and the teachers found, each with its configuration."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.teachers: list[tuple[Config, ModelFiles]] = []

    def of(self, check: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Returns the result of `check`; None, and its mistake noted, for a MegadistillError."""
        try:
            return check(*args, **options)
        except MegadistillError as error:
            self.lines += str(error).splitlines()
            return None

    def raise_all(self) -> None:
        if self.lines:
            raise ConfigError("\n".join(dict.fromkeys(self.lines)))
