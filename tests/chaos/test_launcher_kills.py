"""Kills of ranks and launchers of a real `deepspeed` run: the same bytes, and nobody stays."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from tests.chaos.harness import (
    LAYOUTS,
    RUN_S,
    STOP_S,
    Chaos,
    Kill,
    arguments,
    begun,
    make_corpus,
    markers,
)
from tests.ports import free_port

pytestmark = [pytest.mark.launcher, pytest.mark.long]
PARTS, KILLS = 5, 4
START_S = 90
ONE, ALL = "one rank", "all ranks"
RUNNER, LAUNCHERS = "the `deepspeed` command", "both launchers"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


class LaunchedChaos(Chaos):
    """The same series, each run started by `deepspeed --num_gpus N`."""

    launchers: ClassVar[list[subprocess.Popen]] = []
    ranks: ClassVar[list[psutil.Process]] = []

    def end(self) -> None:
        """Leave nobody behind, also after a failure."""
        for process in [*self.launchers, *self.ranks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for launcher in self.launchers:
            launcher.wait()
        self.launchers.clear()
        self.ranks.clear()

    def attempt(self, folder: Path, layout: str, attempt: int) -> bool:
        world = self.random.choice(LAYOUTS[layout][1])
        how = self.random.choice([ONE, ONE, ALL, RUNNER, LAUNCHERS])
        victim = self.random.randrange(world)
        at_work = self.random.random() < 0.7  # else while they import, which takes longer
        delay = self.random.uniform(0, self.length(layout))
        if len(markers(folder / "cache")) == self.blocks(layout):
            delay = RUN_S  # nothing is left to disturb: a start costs too much to be wasted on it
        notes = folder / f"run-{attempt}"
        notes.mkdir()
        said = notes / "said.log"
        with said.open("w") as output:
            launcher = subprocess.Popen(
                command(world, notes, arguments(self.corpus, folder, layout)),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(),
            )
        self.launchers.append(launcher)
        ranks = self.wait_for_ranks(launcher, world, folder)
        self.ranks += ranks
        there = [notes / f"{'joined' if at_work else 'watching'}-{rank}" for rank in range(world)]
        while launcher.poll() is None and not all(path.exists() for path in there):
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = launcher.wait(delay)
            assert code == 0, self.failure(folder, said.read_text())
            return True
        joined = len(list(notes.glob("joined-*"))) == world
        began = time.monotonic()
        node = [p for p in psutil.Process(launcher.pid).children() if p not in ranks]
        for process in {
            ONE: [ranks[victim]],
            ALL: ranks,
            RUNNER: [psutil.Process(launcher.pid)],
            LAUNCHERS: [psutil.Process(launcher.pid), *node],
        }[how]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs([*ranks, *node], timeout=STOP_S)
        left_s = time.monotonic() - began
        # DeepSpeed's own launcher of a node outlives `deepspeed`; it ends with its ranks.
        assert not alive, self.failure(folder, f"{how} killed, still there: {alive}")
        code = launcher.wait(STOP_S)
        text = said.read_text()
        committed = markers(folder / "cache")
        if code == 0:  # all ranks had done their work before
            return True
        assert "Traceback" not in text, self.failure(folder, text)
        if how is ONE and joined and world > 1 and len(committed) < self.blocks(layout):
            assert "all ranks stop" in text, self.failure(folder, text)
        lost = [len(begun(note) - committed) for note in notes.glob("begun-*")]
        kill = Kill(
            series=self.series,
            layout=layout,
            world=world,
            after_s=delay,
            how=f"{how} (rank {victim})" if how is ONE else how,
            phase=self.phase(folder, layout, committed),
            committed=len(committed),
            again=max(lost, default=0),
            left_s=left_s,
        )
        self.add(kill)
        return False

    def wait_for_ranks(
        self, launcher: subprocess.Popen, world: int, folder: Path
    ) -> list[psutil.Process]:
        """The ranks, by their number."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and launcher.poll() is None:
            found = {}
            for process in psutil.Process(launcher.pid).children(recursive=True):
                try:
                    line, rank = process.cmdline(), process.environ().get("RANK")
                except psutil.Error:
                    continue
                if rank is not None and any(word.endswith("noted.py") for word in line):
                    found[int(rank)] = process
            if len(found) == world:
                return [found[rank] for rank in range(world)]
            time.sleep(0.05)
        raise AssertionError(self.failure(folder, "the ranks were not started"))


def command(world: int, notes: Path, argv: list[str]) -> list[str]:
    return [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        str(world),
        "--master_port",
        str(free_port()),
        str(Path(__file__).parent / "noted.py"),
        str(notes),
        *argv,
    ]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return kept | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])}


@pytest.mark.parametrize("part", range(PARTS))
def test_kills_under_the_real_launcher_leave_the_same_bytes(corpus, tmp_path, capsys, part):
    chaos = LaunchedChaos(corpus, tmp_path, seed=2000 + part, layouts=("tp1", "tp2"))
    try:
        chaos.run(KILLS)
    finally:
        chaos.end()
    with capsys.disabled():
        sys.stdout.write(chaos.summary())
