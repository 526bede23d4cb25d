"""A run on many hosts from its first start to its end, with starts again after a failure.

Every host gets one agent, over an ssh of its own. The run ends when all agents have ended, with the
code of the first one that failed. A host whose connection is lost counts as lost; the ranks of the
others find that out by themselves and end.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megadistill.errors import ConfigError, LockedError, MegadistillError
from megadistill.launcher import HUNG_UP, INTERRUPTED, TERMINATED
from megadistill.launching.connection import (
    LOST,
    is_this_host,
    local_command,
    module_command,
    passed_environment,
)
from megadistill.launching.hostfile import Host
from megadistill.launching.reach import Answer, ask, mistakes
from megadistill.storage.lock import PATIENCE_S, StoreLock

log = logging.getLogger(__name__)

AGENT = "megadistill.launching.agent"
# After the first agent has ended: others' ranks notice a lost host and stop within this time.
OTHERS_END_S = 180.0
WAIT_FOR_HOSTS_S = 1800.0
ASK_AGAIN_S = 10.0
_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGHUP: HUNG_UP}


@dataclass(frozen=True)
class Launch:
    """Holds the command of a run and the hosts it runs on.

    command: `generate` or `train` with its arguments. min_hosts: None for all of `hosts`. locks:
    files that the run will hold, whose dead holders are waited for before another start.
    """

    hosts: Sequence[Host]
    command: Sequence[str]
    max_restarts: int = 0
    min_hosts: int | None = None
    ssh: Sequence[str] = ("ssh",)
    cwd: Path = Path()
    master_port: int | None = None
    locks: Sequence[Path] = ()


def run(launch: Launch) -> int:
    """Starts the ranks on all hosts, waits for their end, and starts again where that is asked for.

    Returns the ranks' exit code. ConfigError, before anything starts, over hosts that cannot take
    part. Code 2, which ranks give for what the user can mend, ends the run as 0 does.
    """
    with _Signals() as signals:
        for restarts in range(launch.max_restarts + 1):
            answers = _wait_for_hosts(launch, signals, first=restarts == 0)
            if restarts:
                _wait_for_locks(launch.locks, signals)
            if signals.told is not None:
                return _CODES[signals.told]
            code = _Round(launch, answers, signals).run()
            if code in (0, ConfigError.exit_code) or signals.told is not None:
                return code
            left = launch.max_restarts - restarts
            log.error("the run ended with code %d; %d restart(s) left", code, left)
        return code


class _Signals:
    """Signals to this process, from `with` to its end: counted, and passed on by a round."""

    def __init__(self) -> None:
        self.told: signal.Signals | None = None
        self.heard = threading.Event()
        self.pass_on: Callable[[signal.Signals], None] = lambda number: None
        self._restore: dict[signal.Signals, object] = {}

    def __enter__(self) -> _Signals:
        for number in _CODES:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._restore[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._restore.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: object) -> None:
        self.told = signal.Signals(number)
        self.heard.set()
        self.pass_on(self.told)


class _Round:
    """One start: an agent a host, until all have ended."""

    def __init__(self, launch: Launch, answers: Sequence[Answer], signals: _Signals) -> None:
        self.launch, self.signals = launch, signals
        self.hosts = [answer.host for answer in answers if answer.facts is not None]
        first = next(answer for answer in answers if answer.facts is not None)
        assert first.facts is not None
        self.port = launch.master_port or first.facts["port"]
        # An address of this host alone would lead the others to themselves.
        alone = len(self.hosts) == 1 and is_this_host(first.host.name)
        here = first.host.name == "localhost"
        self.address = (
            "127.0.0.1" if alone else first.facts["machine"][0] if here else first.host.name
        )
        self.agents: dict[str, subprocess.Popen] = {}

    def run(self) -> int:
        """Returns the code of the first agent that failed, or 0."""
        log.info(
            "starting %d rank(s) on %d host(s): %s",
            sum(host.slots for host in self.hosts),
            len(self.hosts),
            ", ".join(host.name for host in self.hosts),
        )
        try:
            for number, host in enumerate(self.hosts):
                self.agents[host.name] = self._start(number, host)
            self.signals.pass_on = self._pass_on
            if self.signals.told is not None:  # while they were being started
                self._pass_on(self.signals.told)
            return self._wait()
        finally:
            self.signals.pass_on = lambda number: None
            self._end_all()

    def _start(self, number: int, host: Host) -> subprocess.Popen:
        world = {each.name: list(range(each.slots)) for each in self.hosts}
        encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
        arguments = [
            f"--world_info={encoded}",
            f"--node_rank={number}",
            f"--master_addr={self.address}",
            f"--master_port={self.port}",
            "--log_level=warning",
            "--module",
            "megadistill",
            *self.launch.command,
            f"parallel.expect_hosts={len({host.name for host in self.hosts})}",
        ]
        if is_this_host(host.name):
            command, env = local_command(AGENT, arguments), os.environ | passed_environment()
        else:
            ssh, cwd = self.launch.ssh, self.launch.cwd
            command = module_command(host.name, AGENT, arguments, ssh=ssh, cwd=cwd)
            env = dict(os.environ)
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            cwd=self.launch.cwd,
            env=env,
            start_new_session=True,  # the terminal's Ctrl-C comes through this process alone
        )

    def _wait(self) -> int:
        code, ended_at = 0, None
        running = dict(self.agents)
        while running:
            for name, agent in list(running.items()):
                found = agent.poll()
                if found is None:
                    continue
                del running[name]
                if found and not code:
                    code = found
                if found == LOST:
                    log.error("%s: the connection is lost", name)
                ended_at = ended_at or (time.monotonic() if found else None)
            if ended_at is not None and time.monotonic() > ended_at + OTHERS_END_S:
                log.error("%s: the ranks did not end: ending them", ", ".join(running))
                return code
            self.signals.heard.wait(0.2)
            self.signals.heard.clear()
        # What a lost connection hides: the other hosts' code says more.
        others = [c for agent in self.agents.values() if (c := agent.poll()) not in (0, LOST, None)]
        return others[0] if code == LOST and others else code

    def _pass_on(self, number: signal.Signals) -> None:
        for agent in self.agents.values():
            assert agent.stdin
            with contextlib.suppress(OSError):
                agent.stdin.write(f"{number.name}\n".encode())
                agent.stdin.flush()

    def _end_all(self) -> None:
        for agent in self.agents.values():
            assert agent.stdin
            with contextlib.suppress(OSError):
                agent.stdin.close()
        for agent in self.agents.values():
            try:
                agent.wait(OTHERS_END_S if agent.poll() is None else 0)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()


def _wait_for_hosts(launch: Launch, signals: _Signals, *, first: bool) -> list[Answer]:
    """Returns the answers once enough hosts answer; at the first start they must do so at once.

    ConfigError with a line for each host that answers and cannot take part, and where too few
    answer for half an hour.
    """
    needed = launch.min_hosts or len(launch.hosts)
    since = said_at = time.monotonic()
    while True:
        answers = ask(launch.hosts, ssh=launch.ssh, cwd=launch.cwd)
        away = [f"{a.host.name}: {a.problem}" for a in answers if a.unreachable]
        if found_wrong := mistakes(answers):
            raise ConfigError("\n".join([*found_wrong, *away]))
        found = len(answers) - len(away)
        if found >= needed:
            for line in away:
                log.warning("starting without %s", line)
            return answers
        waited = time.monotonic() - since
        if first or waited > WAIT_FOR_HOSTS_S:
            wanted = f"{found} of {len(answers)} hosts answer, expected at least {needed}"
            raise ConfigError("\n".join([*away, f"{wanted}: repair them, or lower --min_hosts"]))
        if time.monotonic() >= said_at:
            said_at = time.monotonic() + 60
            log.warning("waiting for hosts: %s", "; ".join(away))
        if signals.heard.wait(ASK_AGAIN_S):
            return answers


def _wait_for_locks(paths: Sequence[Path], signals: _Signals) -> None:
    """Waits until no process holds the run's locks. A lost host's is dead after a silent minute.

    MegadistillError where one is still alive after five times that.
    """
    until = time.monotonic() + 5 * PATIENCE_S
    for path in paths:
        while signals.told is None:
            try:
                StoreLock(path, what=str(path), patience_s=PATIENCE_S).require_free()
                break
            except LockedError as error:
                if time.monotonic() > until:
                    raise MegadistillError(str(error)) from None
                time.sleep(1)
