"""Values that change over a run: a number, or points [fraction of the run done, value].

Between two points the value runs straight, before the first and behind the last it stays. Two
points at one fraction are a jump; the later one holds there.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

Points = tuple[tuple[float, float], ...]


def _rising(points: Points) -> Points:
    fractions = [fraction for fraction, _ in points]
    if len(points) < 2 or fractions != sorted(fractions):
        raise PydanticCustomError(
            "points",
            "expected at least two points [fraction of the run, value], by rising fraction",
        )
    return points


def curve_of(value: Any) -> Any:
    """The type of a key that takes a `value`, or points of such values."""
    point = tuple[Annotated[float, Field(ge=0, le=1)], value]
    return Annotated[
        Annotated[value, Tag("[number]")]
        | Annotated[tuple[point, ...], AfterValidator(_rising), Tag("[points]")],
        Discriminator(lambda v: "[points]" if isinstance(v, list | tuple) else "[number]"),
    ]


def value_at(curve: float | Points, done: float) -> float:
    """The value when `done` of the run, 0 to 1, is behind."""
    if not isinstance(curve, tuple):
        return curve
    before = [point for point in curve if point[0] <= done]
    if not before:
        return curve[0][1]
    if len(before) == len(curve):
        return curve[-1][1]
    (start, low), (end, high) = before[-1], curve[len(before)]
    return low + (high - low) * (done - start) / (end - start)


def values(curve: float | Points) -> tuple[float, ...]:
    """Every value that is named; all others lie between two of them."""
    return tuple(value for _, value in curve) if isinstance(curve, tuple) else (curve,)


def fractions(curve: float | Points) -> tuple[float, ...]:
    """Where the curve may bend."""
    return tuple(fraction for fraction, _ in curve) if isinstance(curve, tuple) else ()


def format_schedule(curve: float | Points) -> str:
    """For people: `0.5`, or `1 to 0.2`."""
    named = values(curve)
    return f"{named[0]:g}" if len(named) == 1 else f"{named[0]:g} to {named[-1]:g}"
