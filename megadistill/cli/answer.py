"""Print what a command found out: text for people, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def answer(facts: dict[str, Any], text: Callable[[], str], *, as_json: bool) -> None:
    """Print `facts` as JSON, or the text, on standard output."""
    print(json.dumps(facts, sort_keys=True) if as_json else text())
