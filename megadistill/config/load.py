"""From a file and overrides to a checked Config: all mistakes at once, a line each.

The file is found, read, overridden key by key, and validated. Wrong keys are then taken out and
the rest is validated again, so that the rules that concern several keys can speak too.
"""

from __future__ import annotations

import copy
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megadistill.config.rules import Problem, problems
from megadistill.config.schema import Config
from megadistill.config.suggest import closest, did_you_mean
from megadistill.config.yaml_reader import read_yaml
from megadistill.errors import ConfigError

DEFAULT = "zero3.yaml"
_PACKAGE = Path(__file__).resolve().parent.parent

KeyPath = tuple[str | int, ...]


def load_config(name_or_path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a file (default: zero3.yaml), with overrides `a.b=value` applied.

    A path is taken from the current folder; a bare name is looked up in the current folder and
    then in configs/. An override's value is read as YAML, so `train.lr=1e-4` is a number and
    `data.files=[a.txt, b.txt]` a list; `key=null` sets a key back to nothing.

    Raises ConfigError, a line for each mistake.
    """
    file = find_config(name_or_path or DEFAULT)
    where = _shown(file)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from None
    raw = read_yaml(text, where=where)
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(
            f"{where}: holds {found}, expected the sections {', '.join(Config.model_fields)}"
        )
    lines: list[str] = []
    overridden: list[str] = []
    for override in overrides:
        try:
            overridden.append(_dotted(_apply(raw, override)))
        except ConfigError as error:
            lines.append(str(error))
    config, found = validate(raw)
    for problem in found:
        # What was typed last is what has to be mended.
        typed = any(_concerns(key, name) for key in problem.keys for name in overridden)
        lines.append(f"{'command line' if typed else where}: {problem}")
    if lines or config is None:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return config


def validate(raw: dict) -> tuple[Config | None, list[Problem]]:
    """The Config of a plain mapping, or None, and every mistake."""
    raw = copy.deepcopy(raw)
    for name in Config.model_fields:
        # A section whose keys are all commented out is an empty section.
        if name in raw and raw[name] is None and name != "student":
            raw[name] = {}
    if isinstance(raw.get("deepspeed"), dict):
        raw["deepspeed"] = _without_nulls(raw["deepspeed"])
    mistakes: dict[str, Problem] = {}
    config = None
    for _ in range(3):  # a repair may bring another mistake to light, though seldom
        try:
            config = Config.model_validate(raw, context={"rules_later": True})
            break
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                path = _key_path(detail["loc"])
                key = _dotted(path)
                mistakes.setdefault(key, Problem((key,), _message(detail, path)))
                _repair(raw, path, detail)
    found = list(mistakes.values())
    if config is not None:
        found += [
            problem
            for problem in problems(config)
            if not any(_concerns(key, bad) for key in problem.keys for bad in mistakes)
        ]
    return (None if found else config), found


def find_config(name: str) -> Path:
    """The file that `name` stands for; ConfigError that says where it was looked for."""
    given = Path(name).expanduser()
    names = [given] if given.suffix in (".yaml", ".yml") else [given, Path(f"{given}.yaml")]
    places = [Path()]
    if len(given.parts) == 1:
        places += [Path("configs"), *_shipped()]
    elif not given.is_absolute():
        # configs/demo.yaml, from whatever folder the program was started in
        places += [folder.parent for folder in _shipped()]
    tried = []
    for place in places:
        for each in names:
            if (place / each).is_file():
                return place / each
        tried.append(place / names[-1])
    there = sorted(
        {f.name for p in [Path(), Path("configs"), *_shipped()] for f in p.glob("*.y*ml")}
    )
    near = closest(names[-1].name, there)
    raise ConfigError(
        f"{name}: no such configuration; looked for "
        f"{', '.join(dict.fromkeys(_shown(path) for path in tried))}"
        + (f"; did you mean {near}?" if near else f"; there is {', '.join(there) or 'none'}")
    )


def _shipped() -> list[Path]:
    """The folders of the configurations that come with megadistill: a clone's, an install's."""
    folders = [_PACKAGE.parent / "configs", Path(sys.prefix) / "share" / "megadistill" / "configs"]
    return [folder for folder in folders if (folder / DEFAULT).is_file()]


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _apply(raw: dict, override: str) -> KeyPath:
    """Set one `a.b=value` in `raw`. Returns the path that was set."""
    name, equals, text = override.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not all(path):
        is_file = override.endswith((".yaml", ".yml"))
        hint = f"; a configuration file is given as --config {override}" if is_file else ""
        raise ConfigError(
            f"command line: {override!r} is not an override, expected key=value, for example "
            f"train.lr=1e-4{hint}"
        )
    value = read_yaml(text, where=f"command line: {override}") if text.strip() else None
    if path[0] not in Config.model_fields:
        said = _suggest_path(path)
        raise ConfigError(f"command line: {name}: unknown key{said}")
    at = raw
    for depth, key in enumerate(path[:-1]):
        inner = at.get(key)
        if inner is None:
            inner = at[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"command line: {override}: {'.'.join(path[: depth + 1])} is {inner!r}, expected "
                "a section with keys of its own"
            )
        at = inner
    at[path[-1]] = value
    return path


def _suggest_path(path: tuple[str, ...]) -> str:
    """A suggestion for a path whose first part is no section."""
    sections = list(Config.model_fields)
    section = closest(path[0], sections)
    if section is not None and len(path) > 1:
        return f", did you mean {'.'.join((section, *path[1:]))}?"
    return did_you_mean(path[-1], sections, prefix="", all_keys=all_keys())


def _section(name: str) -> type[BaseModel] | None:
    """The model of a section, or None for one without (deepspeed)."""
    field = Config.model_fields.get(name)
    if field is None:
        return None
    kinds = (field.annotation, *typing.get_args(field.annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def all_keys() -> list[str]:
    """The full path of every key but DeepSpeed's own, in the order of the reference."""
    return [
        f"{name}.{key}"
        for name in Config.model_fields
        if (model := _section(name)) is not None
        for key in model.model_fields
    ]


def _without_nulls(value: dict) -> dict:
    # `deepspeed.bf16=null` takes a key of the file out again; DeepSpeed itself has no use for null.
    return {
        key: _without_nulls(inner) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if inner is not None
    }


def _key_path(loc: tuple[str | int, ...]) -> KeyPath:
    return tuple(part for part in loc if not (isinstance(part, str) and "[" in part))


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def _concerns(key: str, bad: str) -> bool:
    return key == bad or key.startswith(f"{bad}.") or bad.startswith(f"{key}.") and "." in key


def _repair(raw: dict, path: KeyPath, detail: Any) -> None:
    """Take a wrong value out of `raw`, or put in one that is missing, so the rest can be checked."""
    at: Any = raw
    parents = []
    for part in path[:-1]:
        if not isinstance(at, dict) or part not in at:
            break
        parents.append((at, part))
        at = at[part]
    if detail["type"] == "missing":
        at[path[-1]] = {} if len(path) == 1 else "missing"
    elif isinstance(at, dict) and path[-1] in at:
        del at[path[-1]]
    elif parents:  # an element of a list: the whole list goes
        holder, part = parents[-1]
        holder.pop(part, None)


def _message(detail: Any, path: KeyPath) -> str:
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        model = _section(str(path[0])) if len(path) > 1 else Config
        siblings = model.model_fields if model else ()
        prefix = _dotted(path[:-1])
        said = did_you_mean(str(path[-1]), siblings, prefix=prefix, all_keys=all_keys())
        return f"unknown key{said}"
    if kind == "missing":
        field = _section(str(path[0]))
        if len(path) > 1 and field is not None:
            said = field.model_fields[str(path[-1])].description or "a value"
            return f"missing, expected {said}: set {_dotted(path)}"
        return f"missing, expected the section {path[0]}"
    expected = _expected(kind, context)
    if expected is None:
        said = detail["msg"].removeprefix("Value error, ")
        return f"{said}, found {_short(value)}"
    if kind == "literal_error" and isinstance(value, str):
        near = closest(value, _choices(path))
        if near is not None:
            return f"expected {expected}, found {value!r}, did you mean {near}?"
    if kind == "string_type" and isinstance(value, int | float):
        return f"expected text, found the number {value!r}: put it in quotes"
    return f"expected {expected}, found {_short(value)}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 80 else shown[:76] + " ..."


def _choices(path: KeyPath) -> list[str]:
    model = _section(str(path[0]))
    if model is None or len(path) != 2:
        return []
    return [c for c in _literals(model.model_fields[str(path[1])].annotation) if isinstance(c, str)]


def _literals(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from _literals(inner)


def _expected(kind: str, context: dict) -> str | None:
    bounds = {"greater_than": ("above", "gt"), "greater_than_equal": ("of at least", "ge"),
              "less_than": ("below", "lt"), "less_than_equal": ("of at most", "le")}  # fmt: skip
    if kind in bounds:
        word, name = bounds[kind]
        return f"a number {word} {context[name]:g}"
    if kind == "literal_error":
        return f"one of {context['expected'].replace(' or ', ', ')}".replace("'", "")
    for start, said in (
        ("int_", "a whole number"),
        ("float_", "a number"),
        ("finite_number", "a finite number"),
        ("bool_", "true or false"),
        ("string_too_short", "text that is not empty"),
        ("string_", "text"),
        ("too_short", "at least one element"),
        ("list_", "a list"),
        ("tuple_", "a list of two numbers"),
        ("too_long", "a shorter list"),
        ("model_", "a section, that is, keys with values"),
        ("dict_", "a section, that is, keys with values"),
    ):
        if kind.startswith(start):
            return said
    return None
