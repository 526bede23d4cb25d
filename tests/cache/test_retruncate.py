"""Retruncating: lists are cut where a fresh selection would, caches are made block by block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megadistill import select_targets
from megadistill.blocks import open_store
from megadistill.cache.reader import open_cache
from megadistill.cache.retruncate import retruncate_cache, retruncate_targets
from megadistill.cache.writer import CacheWriter
from megadistill.errors import ConfigError, CorruptBlockError, RecipeError, StoreError
from megadistill.targets import SparseTargets
from tests.blocks.stores import tree
from tests.cache.caches import create_cache, fill_cache
from tests.cache.targets import make_targets

N, V = 200, 400
KEYS = np.stack([np.full(N, 3), np.arange(N)], 1)
LABELS = np.arange(N) * 3 % V


def selected(method: str, **parameters) -> SparseTargets:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.log_softmax(3 * torch.randn(N, V, generator=generator), 1)
    labels = torch.from_numpy(LABELS).clone()
    labels[::7] = -100
    return select_targets(
        log_probs, method=method, keys_N=torch.from_numpy(KEYS), labels_N=labels, **parameters
    ).numpy()


def assert_same_lists(found: SparseTargets, expected: SparseTargets) -> None:
    for name in ("offsets", "ids", "weights", "truth_added", "entropy", "nll"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_allclose(found.tail, expected.tail, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        ("topk", {"k": 30}, {"k": 5}),
        ("topk", {"k": 30}, {"k": 1}),
        ("topp", {"k": 30, "p": 0.9}, {"k": 8}),
        ("topp", {"k": 30, "p": 0.9}, {"p": 0.4}),
        ("topp", {"k": 30, "p": 0.9}, {"p": 0.6, "k": 4}),
    ],
)
def test_a_list_cut_is_the_list_that_selecting_gives(method, before, after):
    found = retruncate_targets(selected(method, **before), keys_N=KEYS, labels_N=LABELS, **after)
    assert_same_lists(found, selected(method, **before | after))


def test_a_cut_list_in_another_order_is_the_same_list():
    whole = selected("topk", k=30)
    reordered = retruncate_targets(whole, keys_N=KEYS, labels_N=LABELS, k=6)
    backwards = whole.rows(0, N)
    for n in range(N):
        first, last = whole.offsets[n], whole.offsets[n + 1] - bool(whole.truth_added[n])
        for values in (backwards.ids, backwards.weights):
            values[first:last] = values[first:last][::-1].copy()
    assert_same_lists(retruncate_targets(backwards, keys_N=KEYS, labels_N=LABELS, k=6), reordered)


def test_without_labels_a_dropped_truth_joins_the_tail():
    whole = selected("topk", k=30)
    found = retruncate_targets(whole, keys_N=KEYS, k=5)
    np.testing.assert_array_equal(found.truth_added, whole.truth_added)
    counts = whole.counts > 0
    np.testing.assert_array_equal(found.counts, np.where(counts, 5 + whole.truth_added, 0))
    rows = np.repeat(np.arange(N), found.counts)
    listed = np.bincount(rows, found.weights, minlength=N)
    np.testing.assert_allclose((listed + found.tail)[counts], 1, atol=1e-5)


def test_retruncated_varopt_obeys_the_rules_of_varopt():
    whole = selected("varopt", tau=0.02)
    found = retruncate_targets(whole, keys_N=KEYS, tau=0.1)
    assert len(found.ids) < 0.7 * len(whole.ids)
    np.testing.assert_array_equal(found.counts > 0, whole.counts > 0)
    for name in ("entropy", "nll"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert found.tail.any() == 0
    assert len(set(found.rounding[found.counts > 0]) & set(whole.rounding)) == 0
    for n in np.nonzero(whole.counts)[0]:
        old, new = whole.rows(n, n + 1), found.rows(n, n + 1)
        heads = int(new.heads[0])
        assert set(new.ids) <= set(old.ids)
        assert set(old.ids[old.weights >= 0.1]) <= set(new.ids[:heads])
        assert new.ids[0] == old.ids[0]
        assert abs(float(new.weights.sum(dtype=np.float64)) - 1) < 1e-6
        before = dict(zip(old.ids, old.weights, strict=True))
        kept = [before[i] for i in new.ids[:heads]]
        np.testing.assert_allclose(new.weights[:heads], kept, atol=1e-6)
        assert len(set(new.weights[heads:])) <= 1


def test_the_draw_is_a_function_of_key_seed_and_times():
    whole = selected("varopt", tau=0.02)
    one = retruncate_targets(whole, keys_N=KEYS, tau=0.1)
    parts = retruncate_targets(whole.rows(50, 90), keys_N=KEYS[50:90], tau=0.1)
    np.testing.assert_array_equal(one.rows(50, 90).ids, parts.ids)
    np.testing.assert_array_equal(one.rows(50, 90).rounding, parts.rounding)
    for other in ({"seed": 1}, {"times": 1}, {"keys_N": KEYS + 1}):
        found = retruncate_targets(whole, **{"keys_N": KEYS, "tau": 0.1} | other)
        assert not np.array_equal(found.ids, one.ids)


def test_of_equal_weights_the_lower_id_is_kept():
    tied = SparseTargets(
        offsets=np.array([0, 4]),
        ids=np.array([9, 3, 7, 5]),
        weights=np.array([0.4, 0.2, 0.2, 0.2], np.float32),
        tail=np.zeros(1, np.float32),
        method="topk",
    )
    for k, kept in ((2, [9, 3]), (3, [9, 3, 5])):
        assert retruncate_targets(tied, keys_N=KEYS[:1], k=k).ids.tolist() == kept


def test_rows_without_targets_stay_empty():
    empty = selected("varopt", tau=0.05).rows(0, 1)
    assert len(retruncate_targets(empty, keys_N=KEYS[:1], tau=0.5).ids) == 0
    assert len(retruncate_targets(selected("topk").rows(0, 1), keys_N=KEYS[:1], k=1).ids) == 0


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("varopt", {"k": 5}, "varopt targets are retruncated by tau, found k given: set tau"),
        ("topk", {"tau": 0.5}, "topk targets are retruncated by k, found tau given: set k"),
        ("topk", {"p": 0.5, "k": 3}, "found p, k given|found k, p given"),
        ("topp", {}, "topp targets are retruncated by p or k, found none given"),
        ("multinomial", {"k": 5}, "multinomial targets cannot be retruncated"),
    ],
)
def test_another_methods_parameter_is_refused(method, parameters, said):
    with pytest.raises(ConfigError, match=said):
        retruncate_targets(make_targets(method), keys_N=KEYS[:12], **parameters)


# Caches -------------------------------------------------------------------------------------------


def test_a_cache_is_retruncated_whole_and_sound_and_says_what_it_was_made_from(tmp_path: Path):
    source = fill_cache(tmp_path / "source")
    retruncate_cache(tmp_path / "source", tmp_path / "out", tau=0.3, seed=5)
    cache, old = open_cache(tmp_path / "out"), open_cache(tmp_path / "source")
    assert cache.complete()
    assert cache.verify() == []
    assert cache.recipe == source.recipe | {
        "tau": 0.3,
        "retruncated_from": {"tau": 0.06, "content_hash": source.content_hash(), "seed": 5},
    }
    assert cache.store.marker(0)["made_with"] == source.marker(0)["made_with"]
    for i in range(len(old)):
        np.testing.assert_array_equal(cache[i]["tokens"], old[i]["tokens"])
        np.testing.assert_array_equal(cache[i]["targets"].counts > 0, old[i]["targets"].counts > 0)
    assert cache.statistics()["entries"] < old.statistics()["entries"]


def test_retruncating_a_retruncated_cache_names_both_and_draws_anew(tmp_path: Path):
    first = fill_cache(tmp_path / "source")
    second = retruncate_cache(first.path, tmp_path / "second", tau=0.2)
    third = retruncate_cache(second.path, tmp_path / "third", tau=0.4)
    made_from = third.recipe["retruncated_from"]
    assert made_from["content_hash"] == second.content_hash()
    assert made_from["retruncated_from"] == second.recipe["retruncated_from"]
    old, new = open_cache(second.path)[1]["targets"], open_cache(third.path)[1]["targets"]
    keys = np.stack([np.full(8, 1), np.arange(8)], 1)
    expected = retruncate_targets(old, keys_N=keys, tau=0.4, times=1)
    np.testing.assert_array_equal(new.ids, expected.ids)


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch):
    fill_cache(tmp_path / "source")
    retruncate_cache(tmp_path / "source", tmp_path / "whole", tau=0.3)

    def stop(self, block, samples, targets, submit=CacheWriter.submit):
        if block == 1:
            raise KeyboardInterrupt
        submit(self, block, samples, targets)

    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "submit", stop)
        with pytest.raises(KeyboardInterrupt):
            retruncate_cache(tmp_path / "source", tmp_path / "out", tau=0.3)
    assert open_store(tmp_path / "out").committed() == [0]
    done: list[int] = []
    retruncate_cache(tmp_path / "source", tmp_path / "out", tau=0.3, progress=done.append)
    assert done == [1, 2]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    retruncate_cache(tmp_path / "source", tmp_path / "out", tau=0.3, progress=done.append)
    assert done == [1, 2]  # complete: nothing is done


@pytest.mark.parametrize(
    ("recipe", "given", "said"),
    [
        ({}, {"tau": 0.05}, "tau: is 0.06 in .*source, found 0.05, expected above 0.06, at most 1"),
        ({}, {"tau": 0.06}, "found 0.06"),
        ({}, {"tau": 1.5}, "found 1.5"),
        ({}, {"tau": float("nan")}, "found nan"),
        ({}, {"k": 3}, "source: varopt targets are retruncated by tau, found k given"),
        ({"method": "topk", "k": 7}, {"k": 8}, "k: is 7 in .*source, found 8, expected from 0"),
        ({"method": "topk", "k": 7}, {"k": 0}, "k: is 7 in .*source, found 0"),
        ({"method": "topk", "k": 7}, {"tau": 0.5}, "topk targets are retruncated by k, found tau"),
        ({"method": "topp", "k": 7, "p": 0.9}, {"p": 0.95}, "p: is 0.9 in .*, found 0.95"),
        ({"method": "multinomial", "draws": 9}, {"k": 5}, "cannot be retruncated"),
    ],
)
def test_what_would_keep_more_than_there_is_is_refused_and_writes_nothing(
    tmp_path: Path, recipe, given, said
):
    fill_cache(tmp_path / "source", **recipe)
    with pytest.raises(ConfigError, match=said):
        retruncate_cache(tmp_path / "source", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_an_incomplete_or_foreign_source_is_refused(tmp_path: Path):
    fill_cache(tmp_path / "part", blocks=[0, 2])
    with pytest.raises(StoreError, match="part: is not complete, and its missing blocks"):
        retruncate_cache(tmp_path / "part", tmp_path / "out", tau=0.3)
    create_cache(tmp_path / "no_tau", tau="a lot")
    with pytest.raises(CorruptBlockError, match=r"a number as recipe.tau, found a lot"):
        retruncate_cache(tmp_path / "no_tau", tmp_path / "out", tau=0.3)
    create_cache(tmp_path / "other", method="topq")
    with pytest.raises(CorruptBlockError, match=r"recipe.method, one of"):
        retruncate_cache(tmp_path / "other", tmp_path / "out", tau=0.3)
    assert not (tmp_path / "out").exists()


def test_another_caches_folder_is_refused(tmp_path: Path):
    fill_cache(tmp_path / "source")
    before = tree(tmp_path / "source")
    with pytest.raises(RecipeError, match=r"--tau is 0.06, this run's is 0.3"):
        retruncate_cache(tmp_path / "source", tmp_path / "source", tau=0.3)
    assert tree(tmp_path / "source") == before
    retruncate_cache(tmp_path / "source", tmp_path / "out", tau=0.3)
    with pytest.raises(RecipeError, match=r"--seed is 0, this run's is 1"):
        retruncate_cache(tmp_path / "source", tmp_path / "out", tau=0.3, seed=1)
