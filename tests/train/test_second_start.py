"""Two starts of `deepspeed` in one folder: the second is refused, and takes over from the dead."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import termios
import time

import pytest

from megadistill.storage.lock import RUN_LOCK
from tests.train.interrupt import Started, as_from_a_terminal, command, lines
from tests.train.survive import RUN_S, STOP_S, finish, make_run, newest_step, result

pytestmark = [pytest.mark.launcher, pytest.mark.long, pytest.mark.runs]
STEPS = 400


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("second"), steps=STEPS, save_every=5)


def until_it_trains(started, out, steps):
    while lines(out) < steps:
        assert not started.gone(), started.said()
        time.sleep(0.05)


def test_the_second_start_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(
    file, tmp_path
):
    out = tmp_path / "out"
    with Started(command("deepspeed", file, out), tmp_path / "first.log") as first:
        until_it_trains(first, out, 10)
        holder = json.loads((out / RUN_LOCK).read_text())
        with Started(command("deepspeed", file, out), tmp_path / "second.log") as second:
            assert second.wait(RUN_S), second.said()
            assert second.process.returncode == 2, second.said()
        said = [line for line in second.said().splitlines() if line.startswith("error:")]
        who = f"is being written by process {holder['pid']} on {holder['host']} since "
        assert len(said) == 1, second.said()
        assert f"train.out_dir: {out}: {who}{holder['since']}: wait for it, or stop it" in said[0]
        assert "Traceback" not in second.said(), second.said()
        assert not first.gone()
        os.killpg(first.process.pid, signal.SIGKILL)
        assert first.wait(STOP_S)
    with Started(command("deepspeed", file, out), tmp_path / "third.log") as third:
        until_it_trains(third, out, lines(out) + 10)
        assert f"took over the lock of process {holder['pid']}" in third.said()
        assert "resumed at step " in third.said()
        third.send(signal.SIGTERM)
        assert third.wait(STOP_S + 5)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, newest_step(out) + 1))


@pytest.mark.parametrize("how", ["python", "deepspeed"])
def test_a_terminal_that_is_closed_costs_nothing(tmp_path, how):
    """Nobody reads what the ranks write from then on, and their launcher dies of it."""
    short = make_run(tmp_path, steps=30, save_every=None)
    out, (ours, theirs) = tmp_path / "out", pty.openpty()

    def take_the_terminal() -> None:
        as_from_a_terminal()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    argv = command(how, short, out)
    with Started(argv, tmp_path / "log", preexec_fn=take_the_terminal, **streams) as started:
        os.close(theirs)
        os.set_blocking(ours, False)
        while lines(out) < 3:
            assert not started.gone()
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 1 << 16)  # so that nobody waits for a terminal that is full
            time.sleep(0.05)
        done = lines(out)
        os.close(ours)
        assert started.wait(STOP_S + 5)
    assert newest_step(out) == lines(out) >= done
    world = 1 if how == "python" else 2
    finish(short, out, tmp_path / "again", world)
    finish(short, tmp_path / "whole", tmp_path / "whole-notes", world)
    assert result(out) == result(tmp_path / "whole")
