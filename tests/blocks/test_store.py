"""Committing, resuming, planning and reading a block store."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from megadistill.blocks import BlockWriter, open_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.blocks.mds import load_streaming
from megadistill.errors import RecipeError, StoreError
from megadistill.storage.records import encode_json, read_json
from tests.blocks.stores import commit, create, fill, make_samples, same_sample, tree


def test_what_was_committed_is_read_back(tmp_path: Path) -> None:
    samples = make_samples(10)
    fill(tmp_path / "store", samples)
    store = open_store(tmp_path / "store")
    assert store.complete()
    assert len(store) == store.num_sequences == 10
    assert store.num_blocks == 3
    assert all(same_sample(store[i], s) for i, s in enumerate(samples))
    assert [s["tokens"].tolist() for s in store] == [s["tokens"].tolist() for s in samples]
    assert len(store.block(2)) == 2
    store[0]["tokens"][:] = 0  # a copy of the reader's own
    assert same_sample(store[0], samples[0])
    for index in (-1, 10, 11, 12):
        with pytest.raises(IndexError, match=str(index)):
            store[index]


def test_a_sequence_of_a_block_that_is_not_there_yet_is_an_error_of_its_own(tmp_path: Path) -> None:
    store = create(tmp_path / "store")
    store.plan(10)
    commit(store, 1, make_samples(10))
    assert store.missing() == [0, 2]
    assert len(store) == 4
    with pytest.raises(StoreError, match="block 2 is missing"):
        store[9]


# streaming leaves the files it copies from open until they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_stock_streaming_reads_the_folder_sample_for_sample(tmp_path: Path) -> None:
    samples = make_samples(11)
    ours = fill(tmp_path / "store", samples, order=[2, 0, 1])
    streaming = load_streaming()
    streaming.base.util.clean_stale_shared_memory()
    theirs = streaming.StreamingDataset(local=str(tmp_path / "store"), shuffle=False, batch_size=1)
    assert len(theirs) == len(ours) == 11
    for i, sample in enumerate(theirs):
        assert sample.keys() == ours[i].keys()
        assert all(np.array_equal(sample[k], ours[i][k]) for k in sample)
    del theirs
    copied = streaming.StreamingDataset(
        remote=str(tmp_path / "store"),
        local=str(tmp_path / "copy"),
        shuffle=False,
        batch_size=1,
        validate_hash="xxh3_64",
    )
    assert same_sample(copied[10], samples[10])


def test_the_bytes_do_not_depend_on_the_order_of_commits(tmp_path: Path) -> None:
    samples = make_samples(14)
    fill(tmp_path / "a", samples)
    fill(tmp_path / "b", samples, order=[3, 1, 0, 2])
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def _commit_some(path: Path, blocks: list[int]) -> None:
    store = BlockWriter.open(path)
    for block in blocks:
        commit(store, block, make_samples(22))


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    fill(tmp_path / "one", make_samples(22))
    several = create(tmp_path / "several")
    several.plan(22)
    spawn = multiprocessing.get_context("spawn")
    # Both do block 3: a claim that was forgotten is done twice, with the same bytes.
    workers = [
        spawn.Process(target=_commit_some, args=(tmp_path / "several", blocks))
        for blocks in ([5, 3, 1], [0, 2, 3, 4])
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    several.finish()
    assert several.complete()
    assert tree(tmp_path / "one") == tree(tmp_path / "several")


def test_a_rerun_on_a_complete_store_touches_no_file(tmp_path: Path) -> None:
    samples = make_samples(10)
    fill(tmp_path / "store", samples)

    def stamps() -> dict[str, tuple[int, int]]:
        return {
            str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "store").rglob("*")
        }

    before = stamps()
    fill(tmp_path / "store", samples, order=[0, 1, 2])
    assert stamps() == before


def test_nothing_but_bytes_of_the_recipe_is_in_the_folder(tmp_path: Path) -> None:
    fill(tmp_path / "store", make_samples(10))
    assert sorted(tree(tmp_path / "store")) == [
        "blocks.bin",
        "blocks/000000.json",
        "blocks/000001.json",
        "blocks/000002.json",
        "index.json",
        "plan.json",
        "shard.000000.mds",
        "shard.000001.mds",
        "shard.000002.mds",
        "tokens.json",
    ]
    assert tree(tmp_path / "store.run") == {}


def test_the_marker_says_what_the_block_is(tmp_path: Path) -> None:
    store = create(tmp_path / "store")
    marker = commit(store, 1, make_samples(8))
    assert store.marker(1) == marker
    assert (marker["block"], marker["sequences"], marker["cursor"]) == (1, 4, {"row": 1})
    assert marker["statistics"] == {"documents": 4}
    assert marker["shard"]["file"] == "shard.000001.mds"
    assert marker["shard"]["size"] == (tmp_path / "store/shard.000001.mds").stat().st_size
    with pytest.raises(ValueError, match="own keys"):
        store.commit(0, make_samples(4), statistics={}, sequences=3)


def test_another_recipe_is_refused_naming_the_field_both_values_and_the_way_out(
    tmp_path: Path,
) -> None:
    commit(create(tmp_path / "store"), 0, make_samples(4))
    recipe = {"seq_len": 8, "tokenizer": "1a2b", "source": {"name": "corpus", "seed": 0}}
    with pytest.raises(RecipeError, match=r"recipe.tokenizer is '9f8e', .* '1a2b': .*folder"):
        create(tmp_path / "store", header={"recipe": recipe})
    with pytest.raises(RecipeError, match="block_size is 4, this run's is 5"):
        create(tmp_path / "store", block_size=5)
    with pytest.raises(StoreError, match="of kind tokens, expected cache"):
        create(tmp_path / "store", kind="cache")


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"holds thesis\.tex"):
        create(tmp_path / "store")
    with pytest.raises(StoreError, match="not a cache or a token store"):
        open_store(tmp_path / "store")
    assert tree(tmp_path) == {"store/thesis.tex": b"years of work"}
    with pytest.raises(StoreError, match="is a file"):
        create(tmp_path / "store/thesis.tex")
    with pytest.raises(StoreError, match="no such folder"):
        open_store(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"features": ["remote"]}, "features"),
        ({"kind": "cache"}, "kind"),
        ({"columns": {"tokens": "pkl", "sum": "uint64"}}, "encoding 'pkl'"),
        ({"block_size": -1}, "block_size"),
    ],
)
def test_what_this_version_does_not_know_is_refused(
    tmp_path: Path, change: dict, says: str
) -> None:
    create(tmp_path / "store")
    header = tmp_path / "store/tokens.json"
    record = {k: v for k, v in read_json(header).items() if k != "xxh3"}
    header.write_bytes(encode_json(record | change))
    with pytest.raises(StoreError, match=says):
        open_store(tmp_path / "store")


def test_raising_the_plan_does_the_short_last_block_again(tmp_path: Path) -> None:
    samples = make_samples(14)
    store = fill(tmp_path / "store", samples[:10])
    store.plan(14)
    assert store.missing() == [2, 3]
    assert not store.complete()
    for block in store.missing():
        commit(store, block, samples)
    store.finish()
    fill(tmp_path / "fresh", samples)
    assert tree(tmp_path / "store") == tree(tmp_path / "fresh")
    with pytest.raises(StoreError, match="cannot be lowered to 10"):
        store.plan(10)


def test_a_store_that_grows_takes_its_plan_back_first(tmp_path: Path) -> None:
    samples = make_samples(14)
    store = fill(tmp_path / "store", samples[:10])
    store.plan(None)
    assert store.num_sequences is None
    assert not store.complete()
    commit(store, 2, samples)
    commit(store, 3, samples)
    store.plan(14)
    store.finish()
    assert store.complete()
    assert all(same_sample(store[i], s) for i, s in enumerate(samples))


def test_more_than_a_million_blocks_are_refused_with_the_size_that_fits(tmp_path: Path) -> None:
    store = create(tmp_path / "store")
    with pytest.raises(StoreError, match="block_size to at least 11"):
        store.plan(10_000_001)


def test_samples_that_do_not_fit_the_columns_leave_nothing_behind(tmp_path: Path) -> None:
    store = create(tmp_path / "store")
    before = tree(tmp_path)
    good = make_samples(1)[0]
    for bad in (
        good | {"tokens": good["tokens"].astype(np.int64)},
        good | {"tokens": good["tokens"][:4]},
        good | {"documents": np.zeros(0, np.uint32)},
    ):
        with pytest.raises(ValueError, match="column"):
            store.commit(0, [bad], statistics={})
    with pytest.raises(ValueError, match="does not fit"):
        store.commit(0, make_samples(5), statistics={})
    assert tree(tmp_path) == before


def test_a_long_ragged_column_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = create(tmp_path / "store")
    for block, length in enumerate((1, 255, 256, 70_000)):
        sample = make_samples(1)[0] | {"documents": np.arange(length, dtype=np.uint32)}
        store.commit(block, [sample] * 4, statistics={})
        assert same_sample(store[4 * block], sample)


def test_cleaning_removes_shards_without_a_marker_and_temporary_files(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", make_samples(10))
    whole = tree(tmp_path)
    (tmp_path / "store/shard.000007.mds").write_bytes(b"half a shard")
    (tmp_path / "store.run/tmp/dead").mkdir(parents=True)
    (tmp_path / "store.run/tmp/dead/marker").write_bytes(b"{")
    store.clean()
    assert tree(tmp_path) == whole


def test_derived_files_are_mended_from_the_markers(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", make_samples(10))
    whole = tree(tmp_path)
    (tmp_path / "store/blocks.bin").write_bytes(b"nonsense")
    (tmp_path / "store/index.json").unlink()
    again = BlockWriter.open(tmp_path / "store")
    assert len(again) == 10
    assert not again.complete()
    again.finish()
    assert again.complete()
    assert tree(tmp_path) == whole
    assert store.complete()


def test_the_content_hash_is_that_of_the_samples_in_block_order(tmp_path: Path) -> None:
    samples = make_samples(10)
    same = fill(tmp_path / "a", samples).content_hash()
    assert fill(tmp_path / "b", samples, order=[2, 1, 0]).content_hash() == same
    other = make_samples(10)
    other[7]["tokens"][3] += 1
    assert fill(tmp_path / "c", other).content_hash() != same


def test_the_ranking_of_ids_is_written_before_the_header_and_verified(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", make_samples(10), ids_bin=b"ranking")
    assert (tmp_path / "store/ids.bin").read_bytes() == b"ranking"
    assert verify_store(store) == []
    with pytest.raises(RecipeError, match="ids_bin"):
        create(tmp_path / "store", ids_bin=b"another")
    (tmp_path / "store/ids.bin").write_bytes(b"Ranking")
    assert "ids.bin" in verify_store(store)[0]
