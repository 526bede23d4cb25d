"""From a file and overrides to a checked Config: all mistakes at once, a line each.

The file is found, read, overridden key by key, and validated. Wrong keys are then taken out and
the rest is validated again, so that the rules that concern several keys can speak too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from megadistill.config.find import DEFAULT, find_config, shown
from megadistill.config.messages import KeyPath, all_keys, dotted, message
from megadistill.config.other_trainers import KEYS
from megadistill.config.problem import Problem
from megadistill.config.schema import Config, all_problems
from megadistill.config.suggest import closest, did_you_mean
from megadistill.config.yaml_reader import read_yaml
from megadistill.errors import ConfigError


def load_config(name_or_path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a file (default: zero3.yaml), with overrides `a.b=value` applied.

    A path is taken from the current folder; a bare name is looked up in the current folder and
    then in configs/. An override's value is read as YAML, so `train.lr=1e-4` is a number and
    `data.files=[a.txt, b.txt]` a list; `key=null` sets a key back to nothing.

    Raises ConfigError, a line for each mistake.
    """
    file = find_config(name_or_path or DEFAULT)
    where = shown(file)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from None
    raw = read_yaml(text, where=where)
    if not isinstance(raw, dict):
        held = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(
            f"{where}: holds {held}, expected the sections {', '.join(Config.model_fields)}"
        )
    lines: list[str] = []
    overridden: list[str] = []
    for override in overrides:
        try:
            overridden.append(dotted(_apply(raw, override)))
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
                key = dotted(path)
                mistakes.setdefault(key, Problem((key,), message(detail, path)))
                _repair(raw, path, detail)
    found = list(mistakes.values())
    if config is not None:  # always, but for a file that is wrong throughout
        found += [
            problem
            for problem in all_problems(config)
            if not any(_concerns(key, bad) for key in problem.keys for bad in mistakes)
        ]
    return (None if found else config), found


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
    name = path[0] if path[0] in KEYS and path[-1] not in KEYS else path[-1]
    return did_you_mean(name, sections, prefix="", all_keys=all_keys())


def _without_nulls(value: dict) -> dict:
    # `deepspeed.bf16=null` takes a key of the file out again; DeepSpeed itself has no use for null.
    return {
        key: _without_nulls(inner) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if inner is not None
    }


def _key_path(loc: tuple[str | int, ...]) -> KeyPath:
    return tuple(part for part in loc if not (isinstance(part, str) and "[" in part))


def _concerns(key: str, bad: str) -> bool:
    # A rule that names a whole section (no dot) names the keys in question beside it.
    return key == bad or key.startswith(f"{bad}.") or ("." in key and bad.startswith(f"{key}."))


def _repair(raw: dict, path: KeyPath, detail: Any) -> None:
    """Take a wrong value out of `raw`, or put a missing one in: the rest can then be checked."""
    at: Any = raw
    parents = []
    for part in path[:-1]:
        if not isinstance(at, dict) or part not in at:
            break
        parents.append((at, part))
        at = at[part]
    if detail["type"] == "missing" and isinstance(at, dict):
        at[path[-1]] = {} if len(path) == 1 else "missing"
    elif isinstance(at, dict) and path[-1] in at:
        del at[path[-1]]
    elif parents and not isinstance(at, dict):  # an element of a list: the whole list goes
        holder, part = parents[-1]
        holder.pop(part, None)
