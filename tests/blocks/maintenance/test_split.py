"""Splitting: the parts together are the store, and merging them gives it back byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadistill.blocks import open_store
from megadistill.blocks.maintenance.merge import merge_stores
from megadistill.blocks.maintenance.split import split_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.errors import CorruptBlockError, StoreError
from tests.blocks.stores import commit, create, fill, make_samples, tree

SAMPLES = make_samples(18)  # 5 blocks, the last of 2


@pytest.mark.parametrize("count", [2, 3, 5])
def test_parts_merged_are_the_store_again(tmp_path: Path, count: int) -> None:
    store = fill(tmp_path / "store", SAMPLES, ids_bin=b"ranking")
    parts = split_store(store, tmp_path / "part", count)
    assert [p.path.name for p in parts] == [f"part.{i}" for i in range(count)]
    for number, part in enumerate(parts):
        assert part.committed() == [b for b in range(5) if b % count == number]
        assert verify_store(part) == []
        assert (part.path / "ids.bin").read_bytes() == b"ranking"
    shard = parts[1].layout.shard(1)
    assert shard.stat().st_ino == store.layout.shard(1).stat().st_ino  # linked, not copied
    merge_stores(tmp_path / "merged", parts[::-1])
    assert tree(tmp_path / "merged") == tree(store.path)


def test_a_store_with_gaps_and_without_a_plan_is_split_too(tmp_path: Path) -> None:
    store = create(tmp_path / "store")
    for block in (0, 1, 3):
        commit(store, block, SAMPLES)
    store.finish()
    parts = split_store(store, tmp_path / "part", 2)
    assert [p.committed() for p in parts] == [[0], [1, 3]]
    merge_stores(tmp_path / "merged", parts)
    assert tree(tmp_path / "merged") == tree(store.path)


def test_what_cannot_be_split_is_said_and_nothing_written(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", SAMPLES)
    for count in (-1, 0, 1, 6):
        with pytest.raises(StoreError, match="choose from 2 to 5 parts"):
            split_store(store, tmp_path / "part", count)
    with pytest.raises(StoreError, match="expected at least 2 to split"):
        split_store(fill(tmp_path / "small", SAMPLES[:3]), tmp_path / "part", 2)
    (tmp_path / "part.1").mkdir()
    with pytest.raises(StoreError, match=r"part\.1: exists already"):
        split_store(store, tmp_path / "part", 2)
    shard = store.layout.shard(4)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptBlockError, match=r"shard\.000004\.mds"):
        split_store(open_store(store.path), tmp_path / "other", 2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[:5] in ("part.", "other")) == [
        "part.1"
    ]
