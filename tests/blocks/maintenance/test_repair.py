"""Repairing: what is damaged is dropped, what is sound stays as it is, to the byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megadistill.blocks import BlockWriter
from megadistill.blocks.maintenance.repair import repair_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.errors import LockedError, StoreError
from megadistill.storage.files import Files
from tests.blocks.stores import commit, create, fill, make_samples, tree

SAMPLES = make_samples(18)  # 5 blocks, the last of 2


def whole(path: Path) -> BlockWriter:
    return fill(path, SAMPLES, ids_bin=b"ranking")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_sound_store_stays_as_it_is(tmp_path: Path) -> None:
    store = whole(tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
    assert not repair_store(store.path)
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*")} == before


def test_damaged_blocks_and_strays_go_and_the_rest_can_be_completed(tmp_path: Path) -> None:
    store = whole(tmp_path / "store")
    before = tree(store.path)
    flip(store.layout.shard(1))
    flip(store.layout.marker(3))
    store.layout.shard(4).unlink()
    (store.path / "shard.000009.mds").write_bytes(b"left by a dead run")
    looked = repair_store(store.path, dry_run=True)
    assert (store.path / "shard.000009.mds").exists()
    repaired = repair_store(store.path)
    assert repaired == looked
    assert list(repaired.dropped) == [1, 3, 4]
    assert "shard.000001.mds: expected" in repaired.dropped[1]
    assert [p.name for p in repaired.strays] == ["shard.000009.mds"]
    again = BlockWriter.open(store.path)
    assert again.missing() == [1, 3, 4]
    assert verify_store(again) == []
    assert len(list(store.path.glob("shard.*"))) == 2
    for block in again.missing():
        commit(again, block, SAMPLES)
    again.finish()
    assert tree(store.path) == before


def test_wrong_derived_files_are_written_anew(tmp_path: Path) -> None:
    store = whole(tmp_path / "store")
    before = tree(store.path)
    flip(store.layout.blocks_bin)
    store.layout.index.unlink()
    assert not repair_store(store.path)
    assert tree(store.path) == before


def test_a_damaged_plan_is_dropped_and_can_be_made_again(tmp_path: Path) -> None:
    store = whole(tmp_path / "store")
    before = tree(store.path)
    flip(store.layout.plan)
    assert repair_store(store.path, dry_run=True).plan
    assert store.layout.plan.exists()
    assert repair_store(store.path).plan
    again = BlockWriter.open(store.path)
    again.plan(len(SAMPLES))
    assert tree(store.path) == before


@pytest.mark.parametrize("name", ["tokens.json", "ids.bin"])
def test_without_a_sound_header_nothing_is_touched(tmp_path: Path, name: str) -> None:
    store = whole(tmp_path / "store")
    flip(store.path / name)
    flip(store.layout.shard(1))
    before = tree(tmp_path)
    with pytest.raises(StoreError, match=f"cannot be repaired, {name} is damaged"):
        repair_store(store.path)
    assert tree(tmp_path) == before


def test_a_marker_is_gone_for_good_before_its_shard(tmp_path: Path) -> None:
    store = whole(tmp_path / "store")
    flip(store.layout.shard(1))
    done = []

    class Recording(Files):
        def unlink(self, path: Path) -> None:
            done.append(path.name)
            super().unlink(path)

        def fsync_dir(self, path: Path) -> None:
            done.append(f"{path.name}/")
            super().fsync_dir(path)

    repair_store(store.path, files=Recording())
    marker = done.index("000001.json")
    assert "blocks/" in done[marker : done.index("shard.000001.mds")]


def test_what_cannot_be_opened_just_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = whole(tmp_path / "store")
    before, real = tree(store.path), os.open

    def fails(path, flags, *rest, **names):
        if str(path).endswith("shard.000002.mds"):
            raise OSError(24, "Too many open files")
        return real(path, flags, *rest, **names)

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(StoreError, match="Too many open files"):
        repair_store(store.path)
    monkeypatch.undo()
    assert tree(store.path) == before


def test_a_store_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    store = create(tmp_path / "store")
    with store.lock(), pytest.raises(LockedError):
        repair_store(store.path)
    with pytest.raises(StoreError, match="no such folder"):
        repair_store(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere.run").exists()
