"""Data with a loss mask: targets are made for its positions, and for others where that is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megadistill.blocks import open_store
from megadistill.cache.reader import open_cache
from megadistill.config import Config
from megadistill.data.learned import require_learned
from megadistill.errors import DataError
from megadistill.models.packed_sequences import sample_labels
from megadistill.preflight.plan import make_plan
from tests.cache.building import hashes, settings
from tests.models.made import tiny_model
from tests.ranks import run_ranks
from tests.train.stores import make_store

BUILD, MESSAGE = "tests.cache.building:build", "tests.train.test_held_out:message"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A teacher, and prompts of which a third is completed."""
    folder = tmp_path_factory.mktemp("masked")
    tiny_model(folder / "teacher")
    rows = [
        {"prompt": f"Say what follows {i} and why it does so:", "completion": f" {i + 1}."}
        for i in range(150)
    ]
    (folder / "text.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def masked(folder: Path, cache: Path, **sections) -> Config:
    data = {"prompt_field": "prompt", "completion_field": "completion"}
    return settings(folder, cache, data=data, **sections)


@pytest.fixture(scope="module")
def default(corpus, tmp_path_factory) -> Path:
    cache = tmp_path_factory.mktemp("default") / "cache"
    run_ranks(2, BUILD, config=masked(corpus, cache))
    return cache


def test_targets_are_at_the_positions_of_the_mask_and_nowhere_else(default):
    cache = open_cache(default)
    assert cache.recipe["positions"] == "loss_mask"
    for sample in cache:
        expected = sample_labels(sample) != -100
        assert (sample["targets"].counts > 0).tolist() == expected.tolist()


def test_the_positions_that_are_left_out_cost_no_bytes(default, corpus, tmp_path):
    run_ranks(2, BUILD, config=masked(corpus, tmp_path / "all", targets={"positions": "all"}))
    every, some = open_cache(tmp_path / "all"), open_cache(default)
    statistics = [c.statistics() for c in (some, every)]
    assert statistics[0]["positions"] < 0.5 * statistics[1]["positions"]
    assert statistics[0]["bytes"] < 0.6 * statistics[1]["bytes"]


def test_the_plan_counts_the_positions_of_the_mask(default, corpus, tmp_path):
    """The token store is there; the plan of all positions is what the others would add."""
    some = make_plan(masked(corpus, tmp_path / "cache"), world=1)
    every = make_plan(masked(corpus, tmp_path / "c", targets={"positions": "all"}), world=1)
    tokens = some.token_bytes
    store = open_store(corpus / "tokens")
    share = sum(s["loss_mask"].mean() for s in store) / len(store)
    ratio = (some.cache_bytes - tokens) / (every.cache_bytes - tokens)
    assert ratio == pytest.approx(share, rel=1e-3)


def test_a_mask_that_is_asked_for_gives_the_same_bytes(default, corpus, tmp_path):
    config = masked(corpus, tmp_path / "cache", targets={"positions": "loss_mask"})
    run_ranks(1, BUILD, config=config)
    assert hashes(tmp_path / "cache") == hashes(default)


def test_a_cache_that_was_begun_with_all_positions_keeps_to_them(corpus, tmp_path):
    config = masked(corpus, tmp_path / "cache", targets={"positions": "all"})
    run_ranks(1, BUILD, config=config, stop_after=2)
    assert open_store(tmp_path / "cache").present()
    run_ranks(1, BUILD, config=masked(corpus, tmp_path / "cache"))
    run_ranks(1, BUILD, config=masked(corpus, tmp_path / "whole", targets={"positions": "all"}))
    assert hashes(tmp_path / "cache") == hashes(tmp_path / "whole")


def message(config: Config) -> str:
    ((kind, text),) = run_ranks(1, MESSAGE, config=config)
    assert "\n" not in text
    return f"{kind}: {text}"


def test_a_mask_that_the_data_does_not_have_is_refused(corpus, tmp_path):
    (tmp_path / "plain.txt").write_text("A text without prompts or completions. " * 60)
    data = {"files": [str(tmp_path / "plain.txt")], "dir": str(tmp_path / "tokens")}
    config = settings(corpus, tmp_path / "c", data=data, targets={"positions": "loss_mask"})
    assert message(config).startswith("ConfigError: targets.positions: loss_mask, and ")
    assert not (tmp_path / "c").exists()


def test_a_threshold_of_entropy_that_leaves_nothing_is_an_error_each_time(corpus, tmp_path):
    targets = {"positions": "entropy", "min_entropy": 50.0}
    config = masked(corpus, tmp_path / "cache", targets=targets)
    for _ in range(2):
        said = message(config)
        assert said.startswith("DataError: ")
        assert "not one position has a target" in said
        assert "targets.min_entropy" in said


def test_a_token_store_without_a_label_is_refused(tmp_path):
    store = open_store(make_store(tmp_path / "tokens", method=None, nothing=True))
    with pytest.raises(DataError, match=r"data\.dir: .*there is nothing to learn, no token of 24"):
        require_learned(store, key="data.dir")
    require_learned(open_store(make_store(tmp_path / "some", method=None)), key="data.dir")
