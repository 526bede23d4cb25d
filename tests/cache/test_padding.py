"""Stores whose sequences end in padding: kept ones are read as they were, and damage is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megadistill.blocks import open_store
from megadistill.blocks.layout import FEATURES
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.cache.reader import open_cache
from megadistill.cache.writer import CacheWriter
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.inspect.inspection import inspect_store
from megadistill.inspect.sequence import sequence_facts, sequence_text
from tests.blocks.stores import SEQ_LEN, create, forge
from tests.cache.make_padding import PADDED, create_padded_cache, make, padded_samples, read_padded
from tests.cache.targets import METHODS, make_targets

KEPT = Path(__file__).parent / "padding"
STORES = ("tokens", *METHODS)


@pytest.mark.parametrize("name", STORES)
def test_every_value_is_read_as_it_was(name, tmp_path):
    path = shutil.copytree(KEPT / name, tmp_path / name)
    assert read_padded(path) == json.loads((KEPT / "expected.json").read_text())[name]
    store = open_store(path)
    assert store.header["features"] == ["padding"] == sorted(FEATURES)
    assert (verify_store(store) if name == "tokens" else open_cache(path).verify()) == []


def test_the_script_makes_stores_that_read_alike(tmp_path):
    make(tmp_path / "now")
    for name in STORES:
        assert read_padded(tmp_path / "now" / name) == read_padded(
            shutil.copytree(KEPT / name, tmp_path / "kept" / name)
        )


def test_padding_is_no_position(tmp_path):
    make(tmp_path / "now")
    padding = sum(int(s["padding"]) for s in padded_samples())
    tokens = inspect_store(tmp_path / "now" / "tokens")
    assert tokens["num_positions"] == 7 * SEQ_LEN - padding
    cache = open_cache(tmp_path / "now" / "topk")
    positions = sum(int((s["targets"].counts > 0).sum()) for s in cache)
    assert inspect_store(cache.path)["num_positions"] == positions < 7 * SEQ_LEN - padding


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ([], "padding with the column padding"),
        (["padding", "halves"], "this program knows padding"),
    ],
)
def test_a_header_whose_flags_are_not_its_columns_is_refused(tmp_path, features, said):
    path = shutil.copytree(KEPT / "tokens", tmp_path / "tokens")
    forge(path / "tokens.json", lambda header: header.update(features=features))
    with pytest.raises(StoreError, match=said):
        open_store(path)


def test_a_flag_without_its_column_is_refused(tmp_path):
    path = shutil.copytree(KEPT.parent / "version_1" / "tokens", tmp_path / "tokens")
    forge(path / "tokens.json", lambda header: header.update(features=["padding"]))
    with pytest.raises(StoreError, match="padding with the column padding, and only then"):
        open_store(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"padding": np.uint64(SEQ_LEN)}, "fewer than 8 tokens, found 8"),
        ({"padding": np.uint64(2)}, "the padding's start 6 as the last of documents, found 5"),
        ({"loss_mask": np.ones(SEQ_LEN, np.uint8)}, "a loss_mask of 0 from position 5 on"),
    ],
)
def test_verifying_finds_padding_that_contradicts_the_other_columns(tmp_path, changes, said):
    columns = {**PADDED, "loss_mask": f"ndarray:uint8:{SEQ_LEN}"}
    store = create(tmp_path / "tokens", columns=columns)
    sample = padded_samples()[3] | {"loss_mask": np.zeros(SEQ_LEN, np.uint8)}
    store.plan(1)
    store.commit(0, [sample | changes], statistics={})
    store.finish()
    (finding,) = verify_store(store)
    assert said in finding
    assert "sequence 0" in finding
    with pytest.raises(CorruptBlockError, match=said):
        store[0]


def test_targets_in_padding_are_not_written(tmp_path):
    cache = create_padded_cache(tmp_path / "cache", "topk", None)
    targets = make_targets("topk", positions=SEQ_LEN, seed=1)
    assert targets.counts[4:].any()
    samples = [padded_samples()[4]]
    with (
        pytest.raises(ValueError, match="targets in the 4 tokens of padding"),
        CacheWriter(cache) as w,
    ):
        w.submit(0, samples, [targets])


def test_targets_in_padding_are_not_read(tmp_path):
    cache = create_padded_cache(tmp_path / "cache", "topk", None)
    sample, targets = padded_samples()[4], make_targets("topk", positions=SEQ_LEN, seed=1)
    lying = sample | {"padding": np.uint64(0)}
    with CacheWriter(cache) as writer:
        writer.submit(0, [lying], [targets])
    found = cache[0] | {"padding": 4}
    with pytest.raises(CorruptBlockError, match="no targets in padding"):
        open_cache(tmp_path / "cache")._decoded(found, 0)


def test_people_are_shown_how_much_padding_there_is_and_not_its_tokens(tmp_path):
    cache = open_cache(shutil.copytree(KEPT / "topk", tmp_path / "topk"))
    for index in range(1, len(cache)):
        facts = sequence_facts(cache, index)
        end = SEQ_LEN - index  # of padding, sequence n has n tokens
        assert facts["padding"] == index
        assert facts["documents"] == (cache[index]["documents"] < end).sum()
        assert [row["padding"] for row in facts["positions"]] == [False] * end + [True] * index
        *_, before, last = sequence_text(facts, text_of=None, width=80).splitlines()
        assert last.split() == ["--", "padding:", str(index), "tokens"]
        assert before.split()[0] == str(end - 1)
