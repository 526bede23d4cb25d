"""Messages of one line for wrong values: pydantic's errors in the words of our messages."""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel

from megadistill.config.schema import Config
from megadistill.config.suggest import closest, did_you_mean

KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """`path` as it is written: `train.lr`."""
    return ".".join(str(part) for part in path)


def section_model(name: str) -> type[BaseModel] | None:
    """The model of a section, or None for one without (deepspeed)."""
    field = Config.model_fields.get(name)
    if field is None:
        return None
    kinds = (field.annotation, *typing.get_args(field.annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _model_at(path: KeyPath) -> type[BaseModel] | None:
    """The model whose keys stand at `path`: the configuration's, a section's, a list element's."""
    model: type[BaseModel] | None = Config
    for name in path:
        if model is not None and isinstance(name, str) and name in model.model_fields:
            model = _model_in(model.model_fields[name].annotation)
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in typing.get_args(annotation) if (m := _model_in(a))), None)


def all_keys() -> list[str]:
    """The full path of every key but DeepSpeed's own, in the order of the reference."""
    return [
        f"{name}.{key}"
        for name in Config.model_fields
        if (model := section_model(name)) is not None
        for key in model.model_fields
    ]


def message(detail: Any, path: KeyPath) -> str:
    """The message for one of pydantic's error details at `path`, without the path."""
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        model = _model_at(path[:-1])
        siblings = model.model_fields if model else ()
        prefix = dotted(path[:-1])
        said = did_you_mean(str(path[-1]), siblings, prefix=prefix, all_keys=all_keys())
        return f"unknown key{said}"
    if kind == "missing":
        field = section_model(str(path[0]))
        if len(path) > 1 and field is not None:
            said = field.model_fields[str(path[-1])].description or "a value"
            return f"missing, expected {said}: set {dotted(path)}"
        return f"missing, expected the section {path[0]}"
    if kind == "not_usable":
        return str(detail["msg"])
    expected = _expected(kind, context)
    if expected is None:
        said = detail["msg"].removeprefix("Value error, ")
        return f"{said}, found {_short(value)}"
    if kind == "literal_error" and isinstance(value, str):
        near = closest(value, expected.removeprefix("one of ").split(", "))
        if near is not None:
            return f"expected {expected}, found {value!r}, did you mean {near}?"
    if kind == "string_type" and isinstance(value, int | float):
        return f"expected text, found the number {value!r}: put it in quotes"
    return f"expected {expected}, found {_short(value)}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 80 else shown[:76] + " ..."


def _expected(kind: str, context: dict) -> str | None:
    bounds = {
        "greater_than": ("above", "gt"),
        "greater_than_equal": ("of at least", "ge"),
        "less_than": ("below", "lt"),
        "less_than_equal": ("of at most", "le"),
    }
    if kind in bounds:
        word, name = bounds[kind]
        return f"a number {word} {context[name]:g}"
    if kind == "literal_error":
        return f"one of {context['expected'].replace(' or ', ', ')}".replace("'", "")
    for start, said in (
        ("number_", "a number"),
        ("int_", "a whole number"),
        ("float_", "a number"),
        ("finite_number", "a finite number"),
        ("bool_", "true or false"),
        ("string_too_short", "text that is not empty"),
        ("string_", "text"),
        ("too_short", "at least one element"),
        ("list_", "a list"),
        ("tuple_", "a list of two numbers"),
        ("too_long", "a list of two numbers"),  # nothing else is bounded above
        ("model_", "a section, that is, keys with values"),
        ("dict_", "a section, that is, keys with values"),
    ):
        if kind.startswith(start):
            return said
    return None
