"""A mistake that concerns more than one key."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """A mistake. `keys`: what it is about, the first of them the one to name."""

    keys: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.keys[0]}: {self.message}"
