"""What a crash leaves: every prefix of the recorded file operations, on a disk that forgets.

Recovering means: what was reported durable is there and right, nothing wrong is ever returned, and
running again gives the bytes of an undisturbed run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megadistill.blocks import BlockWriter, open_store
from megadistill.blocks.layout import kind_of
from megadistill.blocks.maintenance.merge import merge_stores
from megadistill.blocks.maintenance.repair import repair_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.errors import CorruptBlockError
from tests.blocks.disk import BROKEN, Disk, Recorder, Unsynced
from tests.blocks.stores import commit, create, fill, make_samples, same_sample, tree

SAMPLES = make_samples(10)
IDS = b"the ranking of ids"
STRAYS = ("a shard without a marker", "differs from what the markers say")


@dataclass(frozen=True)
class Life:
    """Something that happens to the store in `root/store`, and how a rerun goes about it."""

    begin: Callable[[Path], object]  # what lies there before, durable
    happen: Callable[[Path, Recorder], object]
    again: Callable[[Path], object]
    damaged: frozenset[int] = frozenset()  # blocks that may be damaged from before


def nothing(root: Path) -> None:
    pass


def commit_all(store: BlockWriter, total: int, files: Recorder | None = None) -> None:
    """Every block, whether it seems to be there or not."""
    for block in range(-(-total // store.block_size)):
        commit(store, block, SAMPLES[:total])
        if files:
            files.report(block)
    store.finish()


def rerun(root: Path) -> None:
    store = create(root / "store", ids_bin=IDS, files=Unsynced())
    store.clean()
    store.plan(10)
    commit_all(store, 10)


def create_fill_and_raise(root: Path, files: Recorder) -> None:
    store = create(root / "store", ids_bin=IDS, files=files)
    store.plan(6)
    commit_all(store, 6, files)
    files.note("taken back", 1)  # short under the new plan
    store.plan(10)
    commit_all(store, 10, files)


def grow_without_a_plan(root: Path, files: Recorder) -> None:
    store = BlockWriter.open(root / "store", files=files)
    files.note("taken back", 1)
    store.plan(None)
    commit_all(store, 10, files)
    store.plan(10)
    store.finish()


def filled(root: Path, *, total: int = 10) -> None:
    fill(root / "store", SAMPLES[:total], ids_bin=IDS, files=Unsynced())


def filled_and_damaged(root: Path) -> None:
    filled(root)
    shard = root / "store/shard.000001.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")


def replace_a_damaged_block(root: Path, files: Recorder) -> None:
    commit_all(BlockWriter.open(root / "store", files=files), 10, files)


def repair(root: Path, files: Recorder) -> None:
    repair_store(root / "store", files=files)
    replace_a_damaged_block(root, files)


def parts(root: Path) -> None:
    for name, blocks in (("a", (0, 1)), ("b", (1, 2))):
        store = create(root / name, ids_bin=IDS, files=Unsynced())
        store.plan(10)
        for block in blocks:
            commit(store, block, SAMPLES)
        store.finish()


def merge(root: Path, files: Recorder | Unsynced) -> None:
    merge_stores(root / "store", [open_store(root / name) for name in "ab"], files=files)
    if isinstance(files, Recorder):
        for block in range(3):
            files.report(block)


def begun_with_other_settings(root: Path) -> None:
    """By a run that died before its first commit."""
    settings = {"header": {"recipe": {"other": 1}}, "block_size": 3, "ids_bin": b"others"}
    store = create(root / "store", files=Unsynced(), **settings)
    store.plan(99)
    (root / "store/shard.000002.mds").write_bytes(b"a shard that has no marker")


def begin_anew(root: Path, files: Recorder) -> None:
    store = create(root / "store", ids_bin=IDS, files=files)
    store.plan(10)
    commit_all(store, 10, files)


LIVES = {
    "begun anew with other settings": Life(begun_with_other_settings, begin_anew, rerun),
    "created, filled and raised": Life(nothing, create_fill_and_raise, rerun),
    "grown": Life(lambda root: filled(root, total=6), grow_without_a_plan, rerun),
    "a damaged block replaced": Life(
        filled_and_damaged, replace_a_damaged_block, rerun, frozenset([1])
    ),
    "repaired": Life(filled_and_damaged, repair, rerun, frozenset([1])),
    "merged": Life(parts, merge, lambda root: merge(root, Unsynced())),
}


def replay(life: Life, work: Path, make: type[Recorder] = Recorder) -> int:
    """Live, then crash after every operation in every way; the number of states that were left.

    AssertionError, or one of our errors, where one of them is not recovered from.
    """
    filled(work / "undisturbed")
    reference = tree(work / "undisturbed/store")
    root, left = work / "run", work / "left"
    root.mkdir()
    life.begin(root)
    disk, files = Disk.holding(root), make()
    life.happen(root, files)
    states: set[int] = set()  # most operations are on temporary files, and change nothing here
    for operation in files.operations:
        disk.apply(operation)
        for image in disk.crashes(root / "store"):
            ours = frozenset((p, d) for p, d in image.items() if p.is_relative_to(root / "store"))
            state = hash((ours, frozenset(disk.reported)))
            if state in states:
                continue
            states.add(state)
            for folder in disk.folders:
                (left / folder.relative_to(root)).mkdir(parents=True, exist_ok=True)
            for path, data in image.items():
                place = left / path.relative_to(root)
                place.parent.mkdir(parents=True, exist_ok=True)  # streaming makes one of its own
                place.write_bytes(data)
            check_recovery(life, left, disk.reported, reference)
            shutil.rmtree(left)
    return len(states)


def check_recovery(life: Life, root: Path, reported: set[int], reference: dict) -> None:
    path = root / "store"
    if path.is_dir() and kind_of(path):
        store = open_store(path)
        present = set(store.present())
        assert reported <= present, "a block that was reported durable is gone"
        for block in present:
            try:
                samples = store.block(block)
            except CorruptBlockError:
                assert block in life.damaged, "a block is damaged"
                assert block not in reported
                continue
            first = block * store.block_size
            assert all(same_sample(s, SAMPLES[first + i]) for i, s in enumerate(samples))
        expected = STRAYS + tuple(f"shard.{block:06d}.mds: expected" for block in life.damaged)
        assert [f for f in verify_store(store) if not any(e in f for e in expected)] == []
    else:
        assert not reported
    life.again(root)
    assert open_store(path).complete()
    assert tree(path) == reference


@pytest.mark.parametrize("name", LIVES)
def test_a_crash_after_any_operation_is_recovered_from(tmp_path: Path, name: str) -> None:
    assert replay(LIVES[name], tmp_path) > 10


@pytest.mark.parametrize("broken", BROKEN)
def test_the_replay_notices_what_is_broken_on_purpose(
    tmp_path: Path, broken: type[Recorder]
) -> None:
    with pytest.raises((AssertionError, CorruptBlockError)):
        replay(LIVES["created, filled and raised"], tmp_path, broken)
