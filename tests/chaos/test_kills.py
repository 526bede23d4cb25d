"""Exactly once: after any kills, the cache is byte for byte that of an undisturbed run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megadistill.blocks import BlockWriter
from tests.blocks.stores import commit, create, fill, make_samples, tree
from tests.chaos.harness import STOP_S, Chaos, make_corpus, markers, start

PARTS, KILLS = 9, 20


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_few_kills_leave_the_bytes_of_an_undisturbed_run(corpus, tmp_path):
    chaos = Chaos(corpus, tmp_path, seed=2, layouts=("tp1",))
    assert len(chaos.run(2)) >= 2  # the last series is brought to its end


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.long)],
)
def test_interrupted_it_says_how_many_blocks_are_committed_and_resumes(
    corpus, tmp_path, number, code
):
    chaos = Chaos(corpus, tmp_path, seed=3, layouts=("tp1",))
    with start(corpus, tmp_path, "tp1", 2, tmp_path / "notes") as ranks:
        while not markers(tmp_path / "cache"):
            assert ranks.codes == [None, None], ranks.said()
            time.sleep(0.01)
        for process in ranks.processes:  # as a terminal sends it
            os.kill(process.pid, number)
        assert ranks.wait(STOP_S) == [code, code], ranks.said()
        said = ranks.said()
    committed, blocks = len(markers(tmp_path / "cache")), chaos.blocks("tp1")
    assert committed < blocks
    line = f"cache: {committed} of {blocks} blocks are committed; the same command resumes there"
    assert said.count(line) == 1, said
    assert "Traceback" not in said, said
    chaos.finish(tmp_path, "tp1", 2)
    chaos.compare(tmp_path, "tp1")


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_many_kills_leave_the_bytes_of_an_undisturbed_run(corpus, tmp_path, capsys, part):
    chaos = Chaos(corpus, tmp_path, seed=1000 + part)
    chaos.run(KILLS)
    with capsys.disabled():
        sys.stdout.write(chaos.summary())


def test_cleaning_leaves_alone_what_a_rank_of_the_dead_run_commits_meanwhile(tmp_path):
    samples = make_samples(10)
    store = create(tmp_path / "store")
    store.plan(10)
    other = BlockWriter.open(store.path)

    class Late(BlockWriter):
        def present(self) -> list[int]:
            found = super().present()
            if not found:
                commit(other, 0, samples)
            return found

    late = Late(store.path, kind=store.kind)
    late.clean()
    assert late.present() == [0]
    assert late.shard_is_there(late.marker(0))
    for block in late.missing():
        commit(late, block, samples)
    late.finish()
    assert tree(late.path) == tree(fill(tmp_path / "reference", samples).path)
