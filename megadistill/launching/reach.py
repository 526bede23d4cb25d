"""Reaching every host before anything starts: those that cannot take part are named together."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.errors import ConfigError
from megadistill.launching.connection import (
    LOST,
    NO_FOLDER,
    NO_INTERPRETER,
    ROOT,
    is_this_host,
    module_command,
)
from megadistill.launching.hostfile import Host
from megadistill.launching.probe import code_hash, facts

PROBE = "megadistill.launching.probe"
PROBE_S = 60.0  # with the import of torch, from a slow disk
_AT_ONCE = 64


@dataclass(frozen=True)
class Answer:
    """Holds the facts of a host, or why there are none."""

    host: Host
    facts: dict[str, Any] | None
    problem: str | None = None
    unreachable: bool = False  # whether the problem may pass by itself


def ask(hosts: Sequence[Host], *, ssh: Sequence[str], cwd: Path) -> list[Answer]:
    """Asks all hosts in parallel. Takes a minute at most for each 64 of them."""
    with ThreadPoolExecutor(min(_AT_ONCE, len(hosts))) as pool:
        return list(pool.map(lambda host: _ask(host, ssh, cwd), hosts))


def mistakes(answers: Sequence[Answer]) -> list[str]:
    """A line for each host that cannot take part, and why. Hosts that gave no answer are left out.

    The code of this process counts: what other hosts run must be the same.
    """
    own = code_hash()
    lines = []
    seen: dict[tuple[str, ...], str] = {}
    for answer in answers:
        name, slots = answer.host.name, answer.host.slots
        if answer.facts is None:
            if not answer.unreachable:
                lines.append(f"{name}: {answer.problem}")
            continue
        known = seen.setdefault(tuple(answer.facts["machine"]), name)
        if known != name:
            lines.append(f"{name}: is the machine that {known} is: keep one of the two names")
        if answer.facts["code"] != own:
            lines.append(
                f"{name}: {ROOT} holds other code than here: bring all hosts to the same version"
            )
        devices = answer.facts["accelerators"]
        if devices is not None and slots > devices:
            lines.append(f"{name}: slots={slots}, but torch finds {devices} accelerators there")
    return lines


def _ask(host: Host, ssh: Sequence[str], cwd: Path) -> Answer:
    if is_this_host(host.name):
        return Answer(host, facts())
    command = module_command(host.name, PROBE, [], ssh=ssh, cwd=cwd)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_S
        )
    except subprocess.TimeoutExpired:
        return Answer(host, None, f"no answer within {PROBE_S:.0f} s", unreachable=True)
    except OSError as error:
        raise ConfigError(f"--ssh: {ssh[0]}: {error.strerror}: install an ssh client") from None
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    if done.returncode == LOST:
        return Answer(host, None, f"ssh does not reach it: {last}", unreachable=True)
    if done.returncode == NO_FOLDER:
        return Answer(host, None, f"has no folder {cwd}, where this run was started")
    if done.returncode == NO_INTERPRETER:
        return Answer(host, None, f"has no interpreter {sys.executable}")
    try:
        said = json.loads(done.stdout.strip().splitlines()[-1])
        return Answer(host, said if done.returncode == 0 else None, last)
    except (ValueError, IndexError):
        return Answer(host, None, f"cannot run {PROBE}, expected the code of {ROOT} there: {last}")
