"""Progress: one line of the terminal, whatever its width, and lines of the log above it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import sys
import termios
import threading
import tty
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megadistill.cli.command_line import start_logging
from megadistill.storage import progress
from megadistill.storage.durations import readable_seconds
from megadistill.storage.progress import Bar, BlockProgress, Progress

STEP = [
    "loss 5.2391",
    "kd 4.9131",
    "ce 5.0042",
    "lr 3.00e-04",
    "|g| 1.234",
    "24.1k tok/s",
    "data 0.002 s",
    "step 0.345 s",
]
EIGHT: dict[str, Any] = {"total": 8, "unit": "blocks", "mininterval": 0}


class Terminal:
    """Pseudo-terminal of so many columns in place of stderr. A context manager.

    At its end `lines` has what stands on the screen.
    """

    def __init__(self, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.columns, self.lines = columns, [""]
        self._patches, self._written = monkeypatch, b""
        self._screen, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        tty.setraw(slave)
        self._stderr = os.fdopen(slave, "w")
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Terminal:
        self._reader.start()
        self._patches.setattr(sys, "stderr", self._stderr)
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.undo()
        self._stderr.close()
        self._reader.join()
        os.close(self._screen)
        self.lines = self._drawn(self._written.decode())

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while data := os.read(self._screen, 65536):
                self._written += data

    def _drawn(self, written: str) -> list[str]:
        """A carriage return goes back to the first column, and characters overwrite."""
        lines: list[list[str]] = [[]]
        column = 0
        for character in written:
            if character == "\n":
                lines.append([])
                column = 0
            elif character == "\r":
                column = 0
            else:
                assert character.isprintable(), "moves on the screen that are not known here"
                assert column < self.columns, f"wraps at {self.columns}: {''.join(lines[-1])}"
                lines[-1][column : column + 1] = [character]
                column += 1
        return ["".join(line).rstrip() for line in lines]


@pytest.mark.parametrize(("columns", "at_least"), [(80, 1), (100, 2), (140, 5), (200, 8)])
def test_a_bar_fits_the_terminal_with_the_details_that_there_is_room_for(
    columns: int, at_least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        Terminal(columns, monkeypatch) as screen,
        Bar("train", total=200, unit="steps", mininterval=0) as bar,
    ):
        for _ in range(100):
            bar.details(STEP)
            bar.update()
    (*_, line, after) = screen.lines
    assert after == ""
    assert line.startswith("train:  50%|")
    assert len(line.split("|")[1]) >= 10
    details = line.removesuffix("]").partition(" steps/s, ")[2].split(", ")
    assert details == STEP[: len(details)]
    assert len(details) >= at_least
    assert len(details) == len(STEP) or len(line) + len(f", {STEP[len(details)]}") > columns - 10


def test_a_line_of_the_log_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with Terminal(80, monkeypatch) as screen:
        start_logging()
        with Progress("generate", **EIGHT) as bar:
            for block in range(8):
                bar.add()
                logging.getLogger("megadistill").info("block %d is done", block)
    lines = screen.lines
    assert len(lines) == 10
    for block, line in enumerate(lines[:8]):
        assert line[8:].startswith(" INFO ["), line
        assert line.endswith(f"] block {block} is done")
    assert lines[8].startswith("generate: 100%|")
    assert "8/8" in lines[8]
    assert lines[9] == ""


def test_a_run_that_fails_ends_its_bar_before_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with Terminal(80, monkeypatch) as screen:
        with contextlib.suppress(KeyboardInterrupt), Progress("generate", **EIGHT) as bar:
            bar.add(2)
            raise KeyboardInterrupt
        sys.stderr.write("error: stopped\n")
    lines = screen.lines
    assert lines[0].startswith("generate:  25%|")
    assert lines[1:] == ["error: stopped", ""]


def test_a_total_that_nobody_knows_is_counted_without_a_bar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unbounded: dict[str, Any] = {"total": None, "unit": "documents", "mininterval": 0}
    with Terminal(80, monkeypatch) as screen, Progress("tokenising", **unbounded) as bar:
        bar.add(12, details=["0.1M tokens"])
    (line, _) = screen.lines
    assert line.startswith("tokenising: 12 documents [00:00, ")
    assert line.endswith("documents/s, 0.1M tokens]")


def test_without_a_terminal_a_line_is_logged_now_and_then(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, logger="megadistill")
    now = 100.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    with BlockProgress("verifying", total=40) as bar:
        for block in range(30):
            now += 2.0
            bar.add(block)
    assert caplog.messages == [
        "verifying: 15 of 40 blocks, 0.5 blocks/s, about 50 s remaining",
        "verifying: 30 of 40 blocks, 0.5 blocks/s, about 20 s remaining",
    ]
    assert capsys.readouterr().err == ""


def test_blocks_of_an_earlier_run_do_not_speed_up_this_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="megadistill")
    now = 100.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    with Progress("generate", total=1000, unit="blocks", done=900) as bar:
        now += 100.0
        bar.add(10, details=["2.0M tokens"])
    assert caplog.messages == [
        "generate: 910 of 1000 blocks, 0.1 blocks/s, about 15.0 min remaining, 2.0M tokens"
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0 s"),
        (0.43, "0.4 s"),
        (9.96, "10 s"),
        (14.2, "14 s"),
        (99.6, "1.7 min"),
        (600, "10.0 min"),
        (7200, "2.0 h"),
        (86400 * 3.25, "3.2 days"),
    ],
)
def test_durations_are_shown_in_the_unit_that_fits(seconds: float, shown: str) -> None:
    assert readable_seconds(seconds) == shown


def test_no_bar_is_made_elsewhere() -> None:
    """Each tqdm of its own would need the same care for width, log lines and terminals."""
    package = Path(progress.__file__).parents[1]
    users = [f for f in package.rglob("*.py") if "tqdm" in f.read_text()]
    assert users == [Path(progress.__file__)]
