"""Stores of version 1, made once and kept, are read as they were on that day, and written alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megadistill.blocks import BlockWriter, open_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.cache.reader import open_cache
from megadistill.cache.writer import CacheWriter
from tests.cache.make_version_1 import make, read
from tests.cache.targets import METHODS

KEPT = Path(__file__).parent / "version_1"
STORES = ("tokens", *METHODS)


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((KEPT / "expected.json").read_text())


@pytest.mark.parametrize("name", STORES)
def test_every_value_is_read_as_it_was(name, expected, tmp_path):
    path = shutil.copytree(KEPT / name, tmp_path / name)  # reading makes a folder beside the store
    assert read(path) == expected[name]
    store = open_store(path)
    assert store.header["format_version"] == 1
    assert (verify_store(store) if name == "tokens" else open_cache(path).verify()) == []
    assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in (KEPT / name).iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_targets_are_written_as_they_were(method, tmp_path):
    cache = open_cache(shutil.copytree(KEPT / method, tmp_path / method))
    ids_bin = cache.store.layout.ids_bin
    again = BlockWriter.create(
        tmp_path / "again",
        kind="cache",
        header={"recipe": cache.recipe},
        columns={k: v for k, v in cache.store.columns.items() if k != "sum"},
        block_size=cache.store.block_size,
        ids_bin=ids_bin.read_bytes() if ids_bin.exists() else None,
    )
    again.plan(len(cache))
    with CacheWriter(again) as writer:
        for block in again.missing():
            samples = cache.block(block)
            writer.submit(
                block,
                [{k: v for k, v in s.items() if k != "targets"} for s in samples],
                [s["targets"] for s in samples],
            )
    again.finish()
    assert again.content_hash() == cache.store.content_hash()


def test_the_script_makes_stores_that_read_alike(tmp_path):
    make(tmp_path / "now")
    assert {p.name for p in (tmp_path / "now").iterdir()} == {p.name for p in KEPT.iterdir()}
    for name in STORES:
        assert len(read(tmp_path / "now" / name)) == len(read(KEPT / name)) == 7
