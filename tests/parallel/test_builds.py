"""The build of an operator that was killed is done again; who waits for a living one says so."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from megadistill.parallel import builds
from tests.ranks import run_ranks

EXTENSION = """
import sys
from megadistill.cli.command_line import run

def main(argv):
    from megadistill.parallel import builds
    builds.install()
    from torch.utils import cpp_extension
    cpp_extension.load(name="operator", sources=argv, is_python_module=False)

sys.exit(run(main))
"""
DEEPSPEED = """
import sys
from megadistill.cli.command_line import run

def main(argv):
    from megadistill import parallel
    with parallel.joined():
        from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
        CPUAdamBuilder().load()

sys.exit(run(main))
"""


class Start:
    """A process that needs the operator. A context manager; it does not outlive it."""

    def __init__(self, program: str, folder: Path, name: str) -> None:
        source = folder / "operator.cpp"
        source.write_text('#include <regex>\nint operate() { return std::regex("a+").flags(); }\n')
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        self.log = folder / f"{name}.log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, str(source)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=kept | {"TORCH_EXTENSIONS_DIR": str(folder / "built"), "MAX_JOBS": "1"},
            )

    def said(self) -> str:
        return self.log.read_text()

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def kill_while_it_builds(program: str, folder: Path) -> Path:
    """A start that is killed while the compiler runs; the lock that it leaves."""
    with Start(program, folder, "killed") as start:
        while not (found := [*folder.rglob("lock")]) or not [*folder.rglob("build.ninja")]:
            assert start.process.poll() is None, start.said()
            time.sleep(0.01)
        start.process.send_signal(signal.SIGKILL)
    assert found[0].exists()
    return found[0]


@pytest.mark.parametrize(
    "program",
    [EXTENSION, pytest.param(DEEPSPEED, marks=[pytest.mark.long, pytest.mark.runs])],
    ids=["an extension", "DeepSpeed's"],
)
def test_after_a_kill_in_the_first_build_the_next_start_builds_and_ends(tmp_path, program):
    lock = kill_while_it_builds(program, tmp_path)
    with Start(program, tmp_path, "next") as start:
        assert start.process.wait(300) == 0, start.said()
        assert f"{lock}: the process that built here is gone: building again" in start.said()
    assert not lock.exists()
    assert [*tmp_path.rglob("*.so")]


class Meanwhile:
    """Stands for time in `builds`: something happens the first time that somebody sleeps."""

    def __init__(self, happens) -> None:
        self.happens, self.now = happens, 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += builds.SAY_AFTER_S + 1
        if self.now > 3 * builds.SAY_AFTER_S:
            self.happens()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "megadistill")
    builds.install()
    return caplog


def test_a_build_of_a_living_process_is_waited_for_and_named(tmp_path, monkeypatch, said):
    path = tmp_path / "operator" / "lock"
    path.parent.mkdir()
    builder = FileBaton(str(path))
    assert builder.try_acquire()
    monkeypatch.setattr(builds, "time", Meanwhile(builder.release))
    assert not FileBaton(str(path)).try_acquire()  # the other one has built
    (line,) = said.messages
    assert line == (
        f"{path}: process {os.getpid()} is building the operator operator: waiting for it"
    )


@pytest.mark.parametrize("unknown", ["another host", "another container", "another user"])
def test_a_lock_whose_holder_cannot_be_known_is_named_with_the_cure_and_left(
    tmp_path, monkeypatch, said, unknown
):
    path = tmp_path / "operator" / "lock"
    path.parent.mkdir()
    path.touch()
    if unknown == "another host":
        monkeypatch.setattr(builds, "_file_system", lambda folder: "nfs4")
    elif unknown == "another container":
        monkeypatch.setattr(builds, "_file_system", lambda folder: "ext4")
        monkeypatch.setattr(builds, "_link", lambda path: "pid:[4026532000]")
    else:
        monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(builds, "time", Meanwhile(path.unlink))
    assert not FileBaton(str(path)).try_acquire()
    (line,) = said.messages
    assert f"{path}: waiting for the build of the operator operator" in line
    assert line.endswith(f"remove the file (rm {path})")


def test_of_two_that_find_the_lock_of_a_dead_process_one_builds(tmp_path, said):
    """What the first made is not taken for the dead one's by the second."""
    path = tmp_path / "lock"
    path.touch()
    first = FileBaton(str(path))
    assert first.try_acquire()
    assert builds._holders(path)[0] == [os.getpid()]
    first.release()


def is_installed(mesh):
    return FileBaton.try_acquire is builds._try_acquire


def test_every_start_installs_it():
    assert run_ranks(1, "tests.parallel.test_builds:is_installed") == [True]
