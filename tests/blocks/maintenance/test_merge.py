"""Merging: parts become the single run, byte for byte, or are refused saying why."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadistill.blocks import BlockReader
from megadistill.blocks.maintenance.merge import merge_stores
from megadistill.errors import CorruptBlockError, RecipeError, StoreError
from tests.blocks.stores import RECIPE, commit, create, fill, make_samples, tree

SAMPLES = make_samples(18)  # 5 blocks, the last of 2


def part(path: Path, blocks: list[int], *, total: int = 18, seed: int = 0) -> BlockReader:
    store = create(path)
    store.plan(total)
    for block in blocks:
        commit(store, block, make_samples(18, seed=seed)[:total])
    store.finish()
    return store


def test_parts_merged_are_the_single_run(tmp_path: Path) -> None:
    single = fill(tmp_path / "single", SAMPLES)
    parts = [part(tmp_path / f"part{i}", [b for b in range(5) if b % 3 == i]) for i in range(3)]
    merged = merge_stores(tmp_path / "merged", parts).store
    assert merged.complete()
    assert tree(merged.path) == tree(single.path)
    assert merged.content_hash() == single.content_hash()
    shard = merged.layout.shard(1)
    assert shard.stat().st_ino == parts[1].layout.shard(1).stat().st_ino  # linked, not copied


def test_overlapping_parts_and_a_second_merge_are_one_store(tmp_path: Path) -> None:
    single = fill(tmp_path / "single", SAMPLES)
    parts = [part(tmp_path / "a", [0, 1, 2]), part(tmp_path / "b", [2, 3])]
    merged = merge_stores(tmp_path / "merged", parts).store
    assert merged.missing() == [4]
    again = merge_stores(tmp_path / "merged", [part(tmp_path / "c", [4, 0])]).store
    assert tree(again.path) == tree(single.path)


def test_a_block_held_twice_with_different_bytes_is_listed_unless_one_is_preferred(
    tmp_path: Path,
) -> None:
    parts = [part(tmp_path / "a", [0, 1, 2]), part(tmp_path / "b", [2, 3, 4], seed=1)]
    with pytest.raises(StoreError, match=r"different bytes: 2 \(.*content_hash.*--prefer"):
        merge_stores(tmp_path / "merged", parts)
    assert not (tmp_path / "merged").exists()
    merged = merge_stores(tmp_path / "merged", parts, prefer=tmp_path / "b").store
    assert merged.marker(2) == parts[1].marker(2)
    with pytest.raises(StoreError, match="not among the stores"):
        merge_stores(tmp_path / "other", parts, prefer=tmp_path / "c")


def test_different_recipes_are_refused_naming_the_field(tmp_path: Path) -> None:
    other = create(tmp_path / "b", header={"recipe": RECIPE | {"tokenizer": "1a2b"}})
    with pytest.raises(RecipeError, match=r"recipe\.tokenizer is '9f8e'.*'1a2b'.*list of caches"):
        merge_stores(tmp_path / "merged", [part(tmp_path / "a", [0]), other])
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/mine.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds mine\.txt"):
        merge_stores(tmp_path / "merged", [part(tmp_path / "a", [0])])
    assert tree(tmp_path / "merged") == {"mine.txt": b"mine"}


def test_the_larger_plan_counts_and_a_block_short_under_it_is_left_out(tmp_path: Path) -> None:
    parts = [part(tmp_path / "a", [0, 1, 2], total=10), part(tmp_path / "b", [3, 4])]
    merged = merge_stores(tmp_path / "merged", parts).store
    assert merged.num_sequences == 18
    assert merged.missing() == [2]


def test_a_damaged_block_is_taken_from_the_part_where_it_is_sound(tmp_path: Path) -> None:
    parts = [part(tmp_path / "a", [0, 1]), part(tmp_path / "b", [1, 2, 3, 4])]
    shard = parts[0].layout.shard(1)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    merged = merge_stores(tmp_path / "merged", parts).store
    assert tree(merged.path) == tree(fill(tmp_path / "single", SAMPLES).path)
    shard = parts[1].layout.shard(2)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptBlockError, match=r"b/shard\.000002\.mds"):
        merge_stores(tmp_path / "other", parts)
    assert not (tmp_path / "other").exists()


def test_blocks_that_differ_in_what_they_were_made_with_alone_are_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def made_with(path: Path, version: str) -> BlockReader:
        store = create(path)
        store.plan(8)
        for block in (0, 1):
            samples = SAMPLES[block * 4 : block * 4 + 4]
            store.commit(block, samples, statistics={}, made_with={"torch": version})
        store.finish()
        return store

    parts = [made_with(tmp_path / "a", "1"), made_with(tmp_path / "b", "2")]
    merged = merge_stores(tmp_path / "merged", parts)
    assert tree(merged.store.path) == tree(parts[0].path)
    assert "another made_with: block 0, 1: the first is taken" in caplog.text
    merged = merge_stores(tmp_path / "other", parts, prefer=tmp_path / "b")
    assert tree(merged.store.path) == tree(parts[1].path)
    assert {s.path.name for s in merged.taken.values()} == {"b"}


def test_the_ranking_of_ids_goes_along_and_must_be_the_same(tmp_path: Path) -> None:
    single = fill(tmp_path / "single", SAMPLES, ids_bin=b"ranking")
    merged = merge_stores(tmp_path / "merged", [single])
    assert tree(merged.store.path) == tree(single.path)
    other = fill(tmp_path / "other", SAMPLES, ids_bin=b"another")
    with pytest.raises(RecipeError, match=r"ids_bin\.xxh3"):
        merge_stores(tmp_path / "both", [single, other])
    (single.path / "ids.bin").write_bytes(b"rankinG")
    with pytest.raises(CorruptBlockError, match=r"single/ids\.bin"):
        merge_stores(tmp_path / "both", [single])
    assert not (tmp_path / "both").exists()


def test_several_processes_merge_the_same_store(tmp_path: Path) -> None:
    samples = make_samples(80)  # 20 blocks
    single = fill(tmp_path / "single", samples)
    merged = merge_stores(tmp_path / "merged", [single], workers=2)
    assert tree(merged.store.path) == tree(single.path)
    shard = single.layout.shard(11)
    shard.unlink()
    with pytest.raises(CorruptBlockError, match=r"shard\.000011\.mds"):
        merge_stores(tmp_path / "other", [single], workers=2)
    assert not (tmp_path / "other").exists()
