"""The hostfile: a host a line, `name slots=N`, as DeepSpeed reads it.

DeepSpeed drops a host with `slots=0` and runs on this host alone where the file is missing. Both
are errors here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megadistill.errors import ConfigError

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)")


@dataclass(frozen=True)
class Host:
    """A host and the number of ranks that it runs."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """Returns the hosts in the order of the file. ConfigError with a line for each mistake."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"{path}: {reason}, expected a hostfile: name it in --hostfile") from None
    hosts: dict[str, Host] = {}
    mistakes = []
    for number, whole in enumerate(text.splitlines(), 1):
        line = whole.partition("#")[0].strip()
        if not line:
            continue
        where = f"{path}:{number}"
        match = _LINE.fullmatch(line)
        if match is None:
            mistakes.append(f"{where}: found {line!r}, expected `name slots=N`")
            continue
        host = Host(match["name"], int(match["slots"]))
        if host.slots == 0:
            mistakes.append(
                f"{where}: {host.name} has slots=0, expected at least 1: remove the line, or give "
                "the number of its accelerators"
            )
        elif host.name in hosts:
            mistakes.append(f"{where}: {host.name} is there twice: add up its slots in one line")
        else:
            hosts[host.name] = host
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    if not hosts:
        raise ConfigError(f"{path}: names no host, expected lines of `name slots=N`")
    return list(hosts.values())
