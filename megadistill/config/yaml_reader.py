"""YAML as people mean it: the scalars of YAML 1.2, and no key twice.

PyYAML follows YAML 1.1, where `1e-4` is text, `no` is false, `1:30` is ninety and a date is an
object. Here a number is a number, `yes`, `no`, `on` and `off` are text (a key that wants a truth
value takes them all the same), and everything else is text.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import yaml

from megadistill.errors import ConfigError

_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?((\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN)",
        "-+0123456789.",
    ),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's scalars, which refuses a key that comes twice."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{key.value}: given twice, first in line {lines[key.value]}: remove one",
                    key.start_mark,
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep=deep)


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}",
        re.compile(rf"(?:{_pattern})\Z"),
        [*_first, ""] if _name == "null" else list(_first),
    )


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    # PyYAML's own would read 010 as eight and 1:30 as ninety.
    return int(loader.construct_scalar(node).replace("_", ""), 0)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_yaml(text: str, *, where: str) -> Any:
    """The value of a YAML document; ConfigError with `where` and the line for what is not one."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        said = error.problem or error.context or "cannot be read"
        raise ConfigError(f"{where}{line}: {said}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{where}: not YAML: {said}") from None


def write_yaml(value: Any) -> str:
    """`value` as YAML that `read_yaml` reads back; keys in the order they have."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=100)


class _Dumper(yaml.SafeDumper):
    """PyYAML's, but for the scalars above: text that reads as a number is quoted."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _write_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    # PyYAML writes 1e-4 as 1.0e-04; repr gives back the same number, in fewer signs.
    text = (
        repr(value)
        if math.isfinite(value)
        else {"inf": ".inf", "-inf": "-.inf"}.get(repr(value), ".nan")
    )
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _write_float)
