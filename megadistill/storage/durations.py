"""Durations as people read them."""

from __future__ import annotations

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def readable_seconds(seconds: float) -> str:
    """`seconds` in the unit that fits: 0.4 s, 14 s, 3.5 min, 2.1 h, 4.0 days."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.95 * _MINUTE:
        return f"{seconds / _MINUTE:.1f} min"
    if seconds < 47.95 * _HOUR:
        return f"{seconds / _HOUR:.1f} h"
    return f"{seconds / _DAY:.1f} days"
