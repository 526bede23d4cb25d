"""tools/merge_and_inspect.py by its contract."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megadistill.blocks import open_store
from megadistill.cache.ranking import IdRanking
from megadistill.cache.writer import CacheWriter
from megadistill.errors import StoreError
from megadistill.inspect.inspection import require_sum
from megadistill.storage.records import encode_json
from tests.blocks.stores import tree
from tests.cache.caches import VOCAB_SIZE, block_of, create_cache, fill_cache
from tests.programs import program
from tests.tools.test_inspect_cache import inspect


def merge(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    from megadistill.cli.command_line import run

    code = run(program("tools/merge_and_inspect.py").main, [str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_parts_become_the_single_run_and_are_shown(tmp_path: Path, capsys) -> None:
    single = fill_cache(tmp_path / "single")
    a = fill_cache(tmp_path / "a", blocks=[0, 2]).path
    b = fill_cache(tmp_path / "b", blocks=[1]).path
    code, out, _ = merge(capsys, "--out", tmp_path / "merged", a, b)
    assert code == 0
    assert "complete" in out
    assert tree(tmp_path / "merged") == tree(single.path)
    code, out, _ = merge(capsys, "--out", tmp_path / "half", a, "--json")
    assert code == 1
    assert json.loads(out)["missing_blocks"] == [1]


def test_what_cannot_be_merged_is_two_in_one_line(tmp_path: Path, capsys) -> None:
    a = fill_cache(tmp_path / "a").path
    other = fill_cache(tmp_path / "other", tau=0.1).path
    code, _, error = merge(capsys, "--out", tmp_path / "merged", a, other)
    assert code == 2
    assert "targets.tau is 0.06" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    code, _, error = merge(capsys, "--out", tmp_path / "mine", a)
    assert code == 2
    assert "notes.txt" in error
    assert merge(capsys, "--out", tmp_path / "merged", tmp_path / "nowhere")[0] == 2
    assert not (tmp_path / "merged").exists()


def test_merging_says_where_blocks_came_from_and_that_the_statistics_are_right(
    tmp_path: Path, capsys
) -> None:
    a = fill_cache(tmp_path / "a", blocks=[0, 2]).path
    b = fill_cache(tmp_path / "b", blocks=[1, 2], torch="2.15.0").path
    code, out, error = merge(capsys, "--out", tmp_path / "merged", a, b)
    assert code == 0
    assert "another made_with: block 2: the first is taken" in error
    assert f"2 block(s) from {a}" in out
    assert f"1 block(s) from {b}" in out
    assert "Every statistic was recomputed; the whole's are their sum" in out


def test_wrong_statistics_are_not_merged(tmp_path: Path, capsys) -> None:
    store = fill_cache(tmp_path / "a")
    marker = {k: v for k, v in store.marker(1).items() if k != "xxh3"}
    marker["statistics"]["entries"] += 1
    store.layout.marker(1).write_bytes(encode_json(marker))
    code, _, error = merge(capsys, "--out", tmp_path / "merged", store.path)
    assert code == 2
    assert "000001.json: statistics.entries" in error
    assert not (tmp_path / "merged").exists()


def test_statistics_that_are_not_the_sum_are_told(tmp_path: Path) -> None:
    parts = {b: fill_cache(tmp_path / str(b), blocks=[b]) for b in range(3)}
    whole = fill_cache(tmp_path / "whole")
    require_sum(whole, parts)
    marker = {k: v for k, v in whole.marker(1).items() if k != "xxh3"}
    marker["statistics"]["entries"] += 1
    whole.layout.marker(1).write_bytes(encode_json(marker))
    with pytest.raises(StoreError, match=r"statistics\.entries is \d+, the sum of its blocks' is"):
        require_sum(whole, parts)


def test_a_cache_is_split_and_its_parts_are_it_again(tmp_path: Path, capsys) -> None:
    store = fill_cache(tmp_path / "cache")
    code, out, _ = merge(capsys, "--split", 3, "--out", tmp_path / "part", store.path)
    assert code == 0
    assert out.splitlines() == [f"{tmp_path}/part.{i}: 1 block(s)" for i in range(3)]
    parts = sorted(tmp_path.glob("part.?"))
    assert merge(capsys, "--out", tmp_path / "merged", *parts)[0] == 0
    assert tree(tmp_path / "merged") == tree(store.path)
    code, _, error = merge(capsys, "--split", 3, "--out", tmp_path / "part", store.path)
    assert (code, "exists already" in error) == (2, True)


def test_a_cache_with_ranked_ids_goes_through_several_processes(tmp_path: Path, capsys) -> None:
    ranking = IdRanking(np.random.default_rng(0).permutation(VOCAB_SIZE)).to_bytes()
    store = fill_cache(tmp_path / "cache", total=80, ids_bin=ranking)
    many = ("--workers", 2)
    assert merge(capsys, "--split", 2, "--out", tmp_path / "part", store.path, *many)[0] == 0
    parts = sorted(tmp_path.glob("part.?"))
    code, out, _ = merge(capsys, "--out", tmp_path / "merged", *parts, *many, "--json")
    assert (code, json.loads(out)["content_hash"]) == (0, store.content_hash())
    assert tree(tmp_path / "merged") == tree(store.path)
    code, out, _ = inspect(capsys, tmp_path / "merged", "--verify", *many)
    assert (code, "every byte" in out) == (0, True)
    shard = open_store(tmp_path / "merged").layout.shard(13)
    shard.unlink()
    code, out, _ = merge(capsys, "--repair", tmp_path / "merged", *many, "--json")
    assert (code, json.loads(out)["missing_blocks"]) == (1, [13])


def test_repairing_says_what_was_dropped_and_what_to_run(tmp_path: Path, capsys) -> None:
    store = fill_cache(tmp_path / "cache")
    whole = tree(store.path)
    store.layout.shard(1).unlink()
    damaged = tree(store.path)
    code, out, _ = merge(capsys, "--repair", store.path, "--dry_run")
    assert code == 1
    assert out.startswith("block 1 would be dropped: ")
    assert tree(store.path) == damaged
    code, out, _ = merge(capsys, "--repair", store.path)
    assert code == 1
    assert out.startswith("block 1 dropped: ")
    assert "missing blocks  1" in out
    assert "run launch/generate.py again with the configuration that wrote it" in out
    assert f"(cache.dir={store.path})" in out
    with CacheWriter(store, made_with={"torch": "2.13.0"}) as writer:
        writer.submit(1, *block_of(1, total=10))
    store.finish()
    assert tree(store.path) == whole
    code, out, _ = merge(capsys, "--repair", store.path)
    assert (code, out.splitlines()[0]) == (0, "nothing is damaged")
    code, out, _ = merge(capsys, "--repair", store.path, "--json")
    assert json.loads(out)["dropped"] == {}


def test_a_cache_whose_targets_cannot_be_decoded_is_repaired_too(tmp_path: Path, capsys) -> None:
    # Sound checksums over nonsense: only decoding tells.
    store = create_cache(tmp_path / "cache")
    store.plan(4)
    samples, _ = block_of(0, total=4)
    store.commit(0, [s | {"targets": b"nonsense"} for s in samples], statistics={})
    code, out, _ = merge(capsys, "--repair", store.path, "--json")
    assert code == 1
    assert list(json.loads(out)["dropped"]) == ["0"]


def test_mistakes_are_one_line_each(tmp_path: Path, capsys) -> None:
    cache = fill_cache(tmp_path / "cache").path
    broken = fill_cache(tmp_path / "broken").path
    (broken / "cache.json").write_bytes(b"{}")
    nowhere, out = tmp_path / "nowhere", tmp_path / "out"
    for arguments, said in (
        (("--repair", nowhere), "no such folder"),
        (("--repair", tmp_path), "not a cache or a token store"),
        (("--repair", broken), "cannot be repaired, cache.json is damaged"),
        (("--split", 2, "--out", out, nowhere), "no such folder"),
        (("--split", 0, "--out", out, cache), "cannot be split in 0: choose from 2 to 3 parts"),
        (("--split", 4, "--out", out, cache), "cannot be split in 4"),
        (("--out", out, cache, "--prefer", nowhere), "is not among the stores"),
    ):
        code, _, error = merge(capsys, *arguments)
        assert code == 2, arguments
        assert len(error.splitlines()) == 1
        assert said in error, error
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["a"],
        ["--repair", "a", "b"],
        ["--repair", "a", "--out", "b"],
        ["--repair"],
        ["--split", "2", "a"],
        ["--split", "two", "--out", "b", "a"],
        ["--dry_run", "--out", "b", "a"],
        ["--split", "2", "--out", "c", "a", "b"],
        ["--repair", "file:///a"],
        ["--out", "file:///a", "b"],
    ],
)
def test_arguments_that_do_not_go_together_are_refused(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        merge(capsys, *arguments)
    assert left.value.code == 2
