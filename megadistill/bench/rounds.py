"""Sides that take turns, and the ratios of what they took: machines are noisy, rounds less so.

Shapes: none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def take_turns(
    ways: Mapping[str, Callable[[], Any]], *, rounds: int, before: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each way in each round; a round before these warms up. before: each, untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(-1, rounds):
        turn = (number + 1) % len(names)
        for name in names[turn:] + names[:turn]:
            before()
            started = time.perf_counter()
            ways[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(of: Sequence[float], to: Sequence[float], *, name: str = "") -> dict[str, float]:
    """{ratio, least, most} of `of` to `to`, round by round; the median first. name: put before."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    named = f"{name}_" if name else ""
    return {
        f"{named}ratio": statistics.median(ratios),
        f"{named}least": min(ratios),
        f"{named}most": max(ratios),
    }
