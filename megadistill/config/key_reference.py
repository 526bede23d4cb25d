"""The key reference as Markdown, from the models: configs/README.md has it between markers."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megadistill.config.messages import section_model
from megadistill.config.registered import RegisteredName
from megadistill.config.schema import Config
from megadistill.errors import ConfigError

BEGIN = "<!-- config reference: begin -->"
END = "<!-- config reference: end -->"


def reference() -> str:
    """A table of keys for each section, in the order of the file."""
    parts = []
    for name, field in Config.model_fields.items():
        model = section_model(name)
        if model is None:
            parts.append(f"### `{name}`\n\n{_sentence(field.description or '')}")
            continue
        parts.append(f"### `{name}`\n\n{inspect.getdoc(model)}\n\n{_table(model)}")
    return "\n\n".join(parts) + "\n"


def updated(text: str, *, file: str) -> str:
    """`text` with the reference between the markers. ConfigError where they are not once each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"{file}: expected the lines {BEGIN} and {END}, once each: put them in")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{reference()}\n{END}{after}"


def _table(model: type[BaseModel]) -> str:
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (
            f"`{name}`",
            _kind(field.annotation, field),
            _default(field),
            _sentence(field.description or ""),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{value}`"


def _kind(annotation: Any, field: FieldInfo | None = None) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        for each in inner[1:]:
            registered = getattr(each, "func", None)
            if isinstance(registered, RegisteredName):
                return ", ".join(f"`{name}`" for name in registered.own)
        return _kind(inner[0]) + _bounds(inner[1:])
    if origin in (typing.Union, types.UnionType):
        return ", ".join(_kind(each) for each in inner if each is not type(None))
    if origin is typing.Literal:
        return ", ".join(f"`{each}`" for each in inner)
    if origin is tuple and typing.get_origin(inner[0]) is tuple:
        return "points"
    if origin in (list, tuple):
        element = _kind(inner[0])
        return f"list of {element if '`' in element else element.partition(' ')[0] + 's'}"
    validators = [getattr(each, "func", None) for each in (field.metadata if field else ())]
    for validator in validators:
        if isinstance(validator, RegisteredName):
            return ", ".join(f"`{name}`" for name in validator.own)
    names = {int: "integer", float: "number", bool: "boolean", str: "text"}
    return names.get(annotation, "mapping") + _bounds(field.metadata if field is not None else ())


def _bounds(metadata: typing.Iterable[Any]) -> str:
    found = {}
    for each in metadata:
        for part in [each, *getattr(each, "metadata", ())]:
            for bound, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                value = getattr(part, bound, None)
                if value is not None and value < 2**62:
                    found[sign] = value
    return "".join(f" {sign} {value}" for sign, value in found.items())
