"""Texts of chats: what two have in common, and chats with other letters in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def common_length(one: str, other: str) -> int:
    """How many characters both begin with. By halves, since comparing slices is fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first; nothing if there are none."""
    ordered = sorted({t for t in tokens if t}, key=lambda t: (-len(t), t))
    return re.compile("(?:" + "|".join(map(re.escape, ordered)) + ")" if ordered else r"(?!)")


def texts_in(value: Any) -> list[str]:
    """Every text in a value of JSON."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in texts_in(v)]
    return [t for v in value for t in texts_in(v)] if isinstance(value, list) else []


def map_text(message: dict[str, Any], change: Any) -> dict[str, Any]:
    """The message with every text changed except its role and the names and ids of tools."""
    kept = ("role", "name", "id", "type", "tool_call_id")

    def mapped(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {k: v if k in kept else mapped(v) for k, v in value.items()}
        return [mapped(v) for v in value] if isinstance(value, list) else value

    return mapped(message)


def letters(found: re.Match[str]) -> str:
    """Letters in place of a match, as many as it has characters."""
    return "x" * len(found[0])


def swap(text: str) -> str:
    """The text with every letter replaced by another one."""
    return re.sub(r"[^\W\d_]", lambda found: "y" if found[0] == "x" else "x", text)
