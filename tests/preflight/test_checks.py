"""Bad input, corpus, folders and settings: one line, before a model is loaded."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from megadistill.config import load_config
from megadistill.errors import ConfigError
from megadistill.preflight import check_generate, check_train
from megadistill.preflight.folder_checks import check_room
from megadistill.preflight.plan import make_plan
from megadistill.storage.disk import check_disk, free_bytes
from tests.preflight.starts import a_cache, config, refused, refused_lines, settings


def test_what_is_sound_passes(start_folder):
    check_generate(config("data.block_size=8"), world=2)
    a_cache()
    check_train(config(), world=2)
    assert sorted(p.name for p in start_folder.iterdir()) == [
        "a.txt",
        "c.yaml",
        "cache",
        "student",
        "teacher",
    ]


def test_a_missing_corpus(start_folder):
    assert refused(check_generate, "data.files=[none/*.txt]").startswith(
        "data.files: no file matches 'none/*.txt'"
    )


def test_generating_needs_a_corpus_and_a_teacher(start_folder):
    lines = refused_lines(check_generate, "data.files=null", "teacher.model=null")
    assert lines == [
        "data: no corpus: set one of data.source=python-stdlib, data.files=[...] (local files) or "
        "data.name (a dataset on the hub)",
        "teacher.model: missing, expected a folder or a hub id: set teacher.model",
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.divergence=jsd"], "loss.divergence: jsd cannot be computed from varopt targets"),
        (["loss.temperature=2"], "loss.temperature: 2.0 differs from the targets' temperature 1.0"),
        (["targets.method=exact"], "targets.method: exact compares whole distributions, which no"),
    ],
)
def test_a_cache_that_the_students_loss_cannot_use_is_not_generated(overrides, said, start_folder):
    assert refused(check_generate, *overrides).startswith(said)


def test_targets_at_another_temperature_are_generated_for_a_loss_that_follows(start_folder):
    check_generate(config("data.block_size=8", "targets.temperature=2"), world=1)


def test_an_empty_corpus(start_folder):
    Path("a.txt").write_text("")
    assert "a.txt: the corpus is empty" in refused(check_generate)


def test_a_corpus_of_unknown_kind(start_folder):
    Path("a.exe").write_text("x")
    assert "a.exe: cannot tell what it holds" in refused(check_generate, "data.files=[a.exe]")


@pytest.mark.parametrize(
    ("check", "key", "folder"),
    [
        (check_generate, "data.dir", "tokens"),
        (check_generate, "cache.dir", "cache"),
        (check_train, "train.out_dir", "run"),
    ],
)
def test_an_output_folder_that_holds_something_else(check, key, folder, start_folder):
    if check is check_train:
        a_cache()
    Path(folder).mkdir()
    (Path(folder) / "thesis.tex").write_text("years of work")
    assert refused(check).startswith(f"{key}: {folder} holds something else (thesis.tex)")
    (Path(folder) / "thesis.tex").unlink()
    check(config(), world=1)
    Path(folder).rmdir()
    Path(folder).write_text("a file")
    assert refused(check).startswith(f"{key}: {folder} is a file, expected a folder")


def test_a_token_store_where_the_cache_should_go(start_folder):
    Path("cache").mkdir()
    Path("cache/tokens.json").write_text("{}")
    assert refused(check_generate).startswith("cache.dir: cache holds a store of kind tokens")
    assert refused(check_train).startswith("cache.dir: cache holds no cache.json")


def test_training_without_a_cache(start_folder):
    assert refused(check_train).startswith("cache.dir: cache does not exist, expected a cache")


def test_the_text_of_a_token_store_is_enough_where_nothing_is_distilled(start_folder):
    Path("tokens").mkdir()
    Path("tokens/tokens.json").write_text("{}")
    check_train(
        config("cache.dir=tokens", "data.dir=other", "loss.kd_weight=0", "loss.ce_weight=1"),
        world=1,
    )
    said = refused(check_train, "cache.dir=tokens", "data.dir=other")
    assert said.startswith("cache.dir: tokens holds no cache.json, expected a cache")


def test_training_with_a_held_out_cache_that_is_not_there(start_folder):
    a_cache()
    assert refused(check_train, "eval.cache=heldout").startswith(
        "eval.cache: heldout does not exist, expected a cache: make it with launch/generate.py"
    )


def test_a_cache_of_another_teacher_that_is_not_there(start_folder):
    a_cache()
    said = refused(check_train, "cache.ensemble=['hf://owner/set', {dir: other, weight: 2}]")
    assert said.startswith(
        "cache.ensemble.1.dir: other does not exist, expected a cache: make it with launch/gener"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cache.dir=[a, b]", "cache.dir: a list of 2 caches is to train from, and generating"),
        ("cache.dir=s3://bucket/cache", "cache.dir: a URL is to train from, and generating"),
        ("data.dir=s3://bucket/tokens", "data.dir: a URL cannot be written in place: set it to"),
    ],
)
def test_generating_into_anything_but_a_folder(override, said, start_folder):
    assert refused(check_generate, override).startswith(said)


def test_training_from_a_list_looks_at_each_and_leaves_urls_to_the_start(start_folder):
    a_cache()
    check_train(config("cache.dir=[cache, {dir: s3://bucket/cache, weight: 2}]"), world=1)
    said = refused(check_train, "cache.dir=[cache, s3://bucket/cache, elsewhere]")
    assert said.startswith("cache.dir: elsewhere does not exist, expected a cache")
    said = refused(check_train, "train.out_dir=s3://bucket/run")
    assert said.startswith("train.out_dir: a URL cannot be trained into")


def test_training_with_a_tracker_whose_library_is_not_installed(start_folder, monkeypatch):
    a_cache()
    monkeypatch.setitem(sys.modules, "wandb", None)  # for Python: there is no such package
    said = refused(check_train, "train.trackers=[wandb]")
    assert said.startswith("train.trackers: wandb needs the package wandb, which is not installed")


def test_training_without_a_student(start_folder):
    assert refused(check_train, "student=null").startswith("student: there is nothing to train")


def test_too_little_disk_for_the_estimate(start_folder):
    line = refused(check_generate, f"cache.min_free={free_bytes('.') / 2**30 + 1}")
    assert line.startswith("cache.dir: cache needs about ")
    assert "and its disk has" in line
    with pytest.raises(ConfigError, match=r"x: none/yet needs about 909\.5 TiB"):
        check_disk("none/yet", 10**15, key="x")
    check_disk("none/yet", 10)


def test_a_disk_that_is_too_small_for_a_run_is_said_with_what_a_run_can_do(start_folder):
    config = load_config("demo.yaml", [f"cache.min_free={free_bytes('.') / 2**30 + 1}"])
    plan = make_plan(config, world=1)
    plan = dataclasses.replace(plan, run_bytes_to_come=10**6)
    with pytest.raises(ConfigError, match=r"^train\.out_dir: .* or keep fewer checkpoints"):
        check_room(config, plan, training=True)


def test_all_mistakes_are_reported_at_once(start_folder):
    settings("teacher", max_position_embeddings=32)
    Path("tokens").write_text("a file")
    lines = refused_lines(check_generate, "data.files=[none.txt]", "teacher.tp=3", world=2)
    assert [line.split(":")[0] for line in lines] == [
        "teacher.tp",
        "data.files",
        "data.dir",
        "data.seq_len",
        "teacher.tp",
    ]
