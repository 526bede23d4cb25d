"""Writing a cache beside the teacher, and reading it back."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadistill.blocks import open_store
from megadistill.cache.reader import open_cache
from megadistill.cache.writer import CacheWriter
from megadistill.errors import CorruptBlockError, StoreError, TeacherError
from tests.blocks.stores import fill, make_samples
from tests.cache.caches import block_of, create_cache, fill_cache
from tests.cache.targets import METHODS, assert_equal_targets


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_gives_back_tokens_and_targets(tmp_path: Path, method: str) -> None:
    fill_cache(tmp_path / "cache", method=method)
    cache = open_cache(tmp_path / "cache")
    assert cache.complete()
    assert len(cache) == cache.num_sequences == 10
    index = 0
    for block in range(3):
        for sample, targets in zip(*block_of(block, total=10, method=method), strict=True):
            assert cache[index].keys() == {"tokens", "documents", "targets"}
            np.testing.assert_array_equal(cache[index]["tokens"], sample["tokens"])
            assert_equal_targets(cache[index]["targets"], targets)
            index += 1
    assert cache.verify(workers=2) == []


def test_a_token_store_is_no_cache(tmp_path: Path) -> None:
    fill(tmp_path / "store", make_samples(4))
    with pytest.raises(StoreError, match="of kind tokens, expected a cache"):
        open_cache(tmp_path / "store")


def test_progress_is_told_only_of_what_is_durable(tmp_path: Path) -> None:
    store = create_cache(tmp_path / "cache")
    durable: list[list[int]] = []
    with CacheWriter(
        store, on_commit=lambda block: durable.append(open_store(store.path).committed())
    ) as writer:
        for block in (1, 0):
            writer.submit(block, *block_of(block, total=10))
    assert durable == [[1], [0, 1]]


def test_one_block_is_written_while_one_is_computed_and_no_more(tmp_path: Path) -> None:
    store = create_cache(tmp_path / "cache")
    go_on, submitted = threading.Event(), []

    def teacher(writer: CacheWriter) -> None:
        for block in range(3):
            writer.submit(block, *block_of(block, total=12))
            submitted.append(block)

    def wait(block: int) -> None:
        if block == 0:
            assert go_on.wait(60)
            assert submitted == [0]

    with CacheWriter(store, on_commit=wait) as writer:
        computing = threading.Thread(target=teacher, args=(writer,))
        computing.start()
        computing.join(0.2)
        assert computing.is_alive()
        go_on.set()
        computing.join()
    assert store.committed() == [0, 1, 2]


def test_values_that_are_not_finite_stop_the_run_with_the_sequence_named(tmp_path: Path) -> None:
    store = create_cache(tmp_path / "cache")
    samples, targets = block_of(1, total=10)
    bad = targets[2].weights.copy()
    bad[0] = np.nan
    targets[2] = dataclasses.replace(targets[2], weights=bad)

    def write() -> None:
        with CacheWriter(store) as writer:
            writer.submit(1, samples, targets)
            writer.submit(0, *block_of(0, total=10))
            writer.submit(2, *block_of(2, total=10))

    with pytest.raises(TeacherError, match=r"sequence 6, position \d: the teacher's weight is nan"):
        write()
    assert 1 not in store.committed()


def test_an_error_of_the_callers_own_is_not_hidden_by_the_writer(tmp_path: Path) -> None:
    store = create_cache(tmp_path / "cache")

    def write() -> None:
        with CacheWriter(store) as writer:
            writer.submit(0, *block_of(0, total=10))
            raise KeyError("the teacher died")

    with pytest.raises(KeyError, match="the teacher died"):
        write()
    assert store.committed() == [0]  # what was handed over is not lost


def test_targets_of_another_length_than_the_tokens_are_refused(tmp_path: Path) -> None:
    store = create_cache(tmp_path / "cache")
    samples, targets = block_of(0, total=10)
    targets[1] = targets[1].rows(0, 3)
    with pytest.raises(ValueError, match="3 targets for 8 tokens"), CacheWriter(store) as writer:
        writer.submit(0, samples, targets)


def test_verifying_recomputes_every_statistic(tmp_path: Path) -> None:
    store = fill_cache(tmp_path / "cache")
    full = [{k: v for k, v in s.items() if k != "sum"} for s in store.block(1)]
    marker = store.marker(1)
    statistics = marker["statistics"] | {"entries": 7}
    store.commit(
        1, full, statistics=statistics, content_hash="0" * 16, made_with=marker["made_with"]
    )
    store.finish()
    content, finding = open_cache(store.path).verify()
    assert f"000001.json: content_hash: expected {marker['content_hash']}" in content
    assert content.endswith("found " + "0" * 16)
    assert "000001.json: statistics.entries: expected" in finding
    assert finding.endswith("found 7")


def test_targets_that_do_not_decode_are_a_typed_error_naming_the_sequence(tmp_path: Path) -> None:
    store = create_cache(tmp_path / "cache")
    samples, _ = block_of(0, total=4)
    store.commit(0, [s | {"targets": b"nonsense"} for s in samples], statistics={})
    with pytest.raises(CorruptBlockError, match=r"shard\.000000\.mds, sequence 2"):
        open_cache(store.path)[2]


@pytest.mark.parametrize("recipe", [{"method": "topk"}, {"temperature": 0.8}])
def test_targets_that_are_not_what_the_recipe_says_are_refused(tmp_path: Path, recipe: Any) -> None:
    store = create_cache(tmp_path / "cache", **recipe)
    with CacheWriter(store) as writer:
        writer.submit(0, *block_of(0, total=4))
    ((name, value),) = recipe.items()
    with pytest.raises(CorruptBlockError, match=f"sequence 3: expected {name} {value}, found"):
        open_cache(store.path)[3]


def test_a_cache_opened_for_a_device_gives_tensors_there(tmp_path: Path) -> None:
    import torch

    path = fill_cache(tmp_path / "cache").path
    there = open_cache(path, device="cpu")
    for sample, expected in zip(there, open_cache(path), strict=True):
        assert isinstance(sample["targets"].ids, torch.Tensor)
        assert_equal_targets(sample["targets"].numpy(), expected["targets"])
    assert there.verify() == []
