"""A store without blocks begins anew with other settings, under the lock and as if it were new."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megadistill.blocks import open_store
from megadistill.errors import LockedError, RecipeError, StoreError
from tests.blocks.stores import COLUMNS, RECIPE, commit, create, fill, make_samples, tree

SAMPLES = make_samples(10)
OTHER = {
    "header": {"recipe": RECIPE | {"tokenizer": "1a2b"}},
    "columns": COLUMNS | {"loss_mask": "ndarray:uint8:8"},
    "block_size": 5,
    "ids_bin": b"another ranking of ids",
}


def test_a_store_without_blocks_takes_another_recipe_columns_block_size_and_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "megadistill")
    create(tmp_path / "store", **OTHER).plan(99)
    store = fill(tmp_path / "store", SAMPLES, ids_bin=b"ids")
    expected = fill(tmp_path / "undisturbed", SAMPLES, ids_bin=b"ids")
    assert tree(store.path) == tree(expected.path)
    (line,) = caplog.messages
    assert "store: holds no block yet: begun anew with other settings: " in line
    assert "block_size 5 -> 4" in line
    assert "recipe.tokenizer '1a2b' -> '9f8e'" in line


def test_the_same_recipe_keeps_the_plan_and_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create(tmp_path / "store").plan(10)
    before = tree(tmp_path / "store")
    assert create(tmp_path / "store").num_sequences == 10
    assert tree(tmp_path / "store") == before
    assert caplog.messages == []


def test_a_damaged_ranking_of_ids_is_written_again_where_no_block_depends_on_it(
    tmp_path: Path,
) -> None:
    create(tmp_path / "store", ids_bin=b"ids")
    (tmp_path / "store/ids.bin").write_bytes(b"idz")
    assert create(tmp_path / "store", ids_bin=b"ids").ids_bin() == b"ids"


def test_one_block_fixes_the_settings(tmp_path: Path) -> None:
    commit(create(tmp_path / "store"), 1, SAMPLES)
    before = tree(tmp_path / "store")
    with pytest.raises(RecipeError):
        create(tmp_path / "store", **OTHER)
    assert tree(tmp_path / "store") == before


def test_a_living_run_that_has_no_block_yet_keeps_its_settings(tmp_path: Path) -> None:
    store = create(tmp_path / "store")
    with store.lock():
        before = tree(tmp_path / "store")
        with pytest.raises(LockedError, match=r"store: is being written by process \d+ on "):
            create(tmp_path / "store", **OTHER)
        assert tree(tmp_path / "store") == before
        commit(store, 0, SAMPLES)


def test_of_two_runs_that_begin_in_one_moment_the_first_notices_that_it_was_replaced(
    tmp_path: Path,
) -> None:
    first = create(tmp_path / "store")
    create(tmp_path / "store", **OTHER)  # before the first has taken the lock
    with first.lock(), pytest.raises(StoreError, match=r"began it anew .*run the command again"):
        first.clean()
    assert open_store(tmp_path / "store").block_size == 5
