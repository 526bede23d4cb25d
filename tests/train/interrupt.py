"""Real starts of a training run, by `python` or `deepspeed`, that are interrupted at random times.

A run of one folder is started, sent a signal, and started again, until it has been interrupted
often enough; then it must end as if nobody had. Ctrl-C goes to all processes of the start, as a
terminal sends it; SIGTERM to the one process that a user sees.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.ports import free_port
from tests.train.survive import ROOT, RUN_S, STOP_S, newest_step

BINARIES = Path(sys.executable).parent
# DeepSpeed's launcher polls its ranks each second, and ends after them.
LAUNCHER_S = 5


def command(how: str, file: Path, out: Path) -> list[str]:
    """python: one rank; deepspeed: two."""
    launcher = {
        "python": [sys.executable],
        "deepspeed": [
            str(BINARIES / "deepspeed"),
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
        ],
    }[how]
    return [*launcher, str(ROOT / "launch/train.py"), "--config", str(file), f"train.out_dir={out}"]


class Started:
    """One start, in a session of its own. A context manager; no process of it outlives it."""

    def __init__(self, argv: list[str], log: Path, **options: Any) -> None:
        """options: of subprocess.Popen, in place of a log file's."""
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        self.log = log
        with log.open("w") as output:
            given = {
                "stdin": subprocess.DEVNULL,
                "stdout": output,
                "stderr": subprocess.STDOUT,
                "preexec_fn": as_from_a_terminal,
            }
            self.process = subprocess.Popen(
                argv,
                start_new_session=True,
                cwd=ROOT,
                env=kept | {"PATH": os.pathsep.join([str(BINARIES), kept["PATH"]])},
                **given | options,
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def send(self, number: int) -> None:
        """Ctrl-C, or a closed terminal, to all; SIGTERM to the process that was started."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGTERM:
                self.process.send_signal(number)
            else:
                os.killpg(self.process.pid, number)

    def gone(self) -> bool:
        """Whether no process of the session is left."""
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def wait(self, seconds: float) -> bool:
        """Whether all have left, at the latest after so many seconds."""
        until = time.monotonic() + seconds
        while not self.gone() and time.monotonic() < until:
            time.sleep(0.05)
        return self.gone()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()


def as_from_a_terminal() -> None:
    # A shell starts jobs in the background, as these tests may be, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def lines(out: Path) -> int:
    """The steps whose line of metrics is complete."""
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def run_to_the_end(how: str, file: Path, out: Path, log: Path) -> float:
    """A start that nobody disturbs; its seconds."""
    began = time.monotonic()
    with Started(command(how, file, out), log) as started:
        assert started.wait(RUN_S), started.said()
        assert started.process.returncode == 0, started.said()
    return time.monotonic() - began


def interrupt(
    how: str, number: int, file: Path, out: Path, log: Path, rng: random.Random, whole_s: float
) -> str:
    """One start, interrupted: while it does its steps, or at any time; what came of it, in a line.

    At most the step in progress is lost, all processes leave in time, and no traceback of ours is
    printed.
    """
    before = lines(out)
    with Started(command(how, file, out), log) as started:
        if rng.random() < 0.7:
            while lines(out) <= before and not started.gone():
                time.sleep(0.01)
            started.wait(rng.uniform(0, 1))
        else:
            started.wait(rng.uniform(0, whole_s))
        assert not started.gone() or (out / "model").exists(), started.said()
        done, began = lines(out), time.monotonic()
        started.send(number)
        left = started.wait(STOP_S + (LAUNCHER_S if how == "deepspeed" else 0))
        left_s, said = time.monotonic() - began, started.said()
        assert left, said
    ours = re.findall(r'File "(.*/megadistill/.*)"', said)
    assert not ours or "deepspeed/launcher" in said, said
    if how == "python":
        assert "Traceback" not in said, said
    saved, after = newest_step(out), lines(out)
    assert saved >= done, said
    assert after == saved, said
    if "step " in said and saved and not (out / "model").exists():
        assert f"stopped at step {saved} of" in said or f"last checkpoint: step {saved};" in said
    name = signal.Signals(number).name
    return f"{how}, {name} after step {done}: left in {left_s:.1f} s, step {saved} saved"
