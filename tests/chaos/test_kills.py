"""Exactly once: after any kills, the cache is byte for byte that of an undisturbed run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megadistill.blocks import BlockStore
from tests.blocks.stores import commit, create, fill, make_samples, tree
from tests.chaos.harness import Chaos, make_corpus

PARTS, KILLS = 9, 20


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_few_kills_leave_the_bytes_of_an_undisturbed_run(corpus, tmp_path):
    chaos = Chaos(corpus, tmp_path, seed=2, layouts=("tp1",))
    assert len(chaos.run(4)) >= 4  # the last series is brought to its end


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
    other = BlockStore.open(store.path)

    class Late(BlockStore):
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
