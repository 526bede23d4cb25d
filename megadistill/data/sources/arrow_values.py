"""Values of Arrow columns as plain Python, and what of them can be used as text or as a chat.

Columns are decoded as `datasets` decodes them in Python format, at any depth. One thing differs:
Arrow gives all structs of a column the same keys and pads them with nulls. A null of a key inside a
struct is therefore dropped, since it cannot be told from padding; the null `content` of a turn (a
dictionary with a `role`) is kept. Values of the type `Json` carry their own keys, and keep nulls.
"""

from __future__ import annotations

from typing import Any

from megadistill.data.sources.compressed import TOO_LONG
from megadistill.data.sources.json_rows import Repeated


def decoded(table: Any) -> list[list[Any] | list[Problem]]:
    """Every column of a pyarrow table: a list of values."""
    return [_column(table.select([i])) for i in range(table.num_columns)]


class Problem:
    """Stands for a value that cannot be decoded: why."""

    def __init__(self, why: str) -> None:
        self.why = why


def _column(table: Any) -> list[Any]:
    import datasets
    import pyarrow

    column, name, kind = table.column(0), table.column_names[0], table.schema.types[0]
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        return [_alone(table.slice(i, 1)) for i in range(table.num_rows)]
    # The fast path: most corpora are plain strings.
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return values
    try:
        feature = datasets.Features.from_arrow_schema(table.schema)
    except ValueError:
        problem = Problem(f"expected text, found Arrow's type {kind}, which `datasets` cannot read")
        return [None if value is None else problem for value in values]
    values = feature.decode_batch({name: values})[name]
    return [_unpadded(value, feature[name]) for value in values]


def _alone(table: Any) -> Any:
    try:
        table.column(0).to_pylist()
    except UnicodeDecodeError:
        return Problem("no UTF-8 text")
    return _column(table)[0]


def _unpadded(value: Any, feature: Any) -> Any:
    """`value` without the nulls that pad its structs. feature: its type, as `datasets` has it."""
    if value is None:
        return None
    if isinstance(feature, dict):
        kept = {k for k, v in value.items() if v is not None}
        if "role" in feature:
            kept.add("content")
        return {k: _unpadded(v, feature[k]) for k, v in value.items() if k in kept}
    inner = getattr(feature, "feature", None)
    if isinstance(value, list) and inner is not None:
        return [_unpadded(v, inner) for v in value]
    return value


def text_problem(value: Any, *, limit: int) -> str | None:
    """Why a value is no text to learn from. Null is an empty text. limit: in bytes."""
    if value is None:
        return None
    if not isinstance(value, str):
        return f"expected text, found {described(value)}"
    return _string_problem(value, limit)


def value_problem(value: Any, *, limit: int) -> str | None:
    """Why a value of texts, numbers, lists and dictionaries cannot be used: the first reason."""
    pending, size = [value], 0
    while pending:
        one = pending.pop()
        if isinstance(one, str):
            size += len(one)
            problem = _string_problem(one, limit) or (TOO_LONG if size > limit else None)
            if problem is not None:
                return problem
        elif isinstance(one, list):
            pending += reversed(one)
        elif isinstance(one, dict):
            if isinstance(one, Repeated):
                return f"key {one.key!r} is there twice"
            pending += reversed([*one, *one.values()])
        elif not isinstance(one, bool | int | float | None):
            return f"expected texts, numbers, lists or dictionaries, found {described(one)}"
    return None


def _string_problem(text: str, limit: int) -> str | None:
    # UTF-8 has at least one byte a character, and at most four.
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        return f"half of a surrogate pair, {half}, at character {error.start + 1}: it is no text"
    return TOO_LONG if size > limit else None


def described(value: Any) -> str:
    """A value for a message: its kind, and its beginning."""
    if isinstance(value, Problem):
        return value.why
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", str: "text"}
    kind = kinds.get(type(value), type(value).__name__)
    if isinstance(value, dict):
        kind = "a dictionary"
    start = ascii(value) if not isinstance(value, list | dict) else ascii(value)[:200]
    return f"{kind}: {start if len(start) <= 40 else start[:37] + '...'}"
