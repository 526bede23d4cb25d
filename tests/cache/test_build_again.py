"""Caches that are begun: what may change, what is validated, and what the log estimates."""

import re
from pathlib import Path

import numpy as np
import pytest

from megadistill.blocks import open_store
from megadistill.cache.build import _equal_rows
from megadistill.cache.disk_guard import block_bytes
from megadistill.cache.reader import open_cache
from megadistill.config import Config
from megadistill.errors import RecipeError
from tests.cache.building import SEQ_LEN, build, settings
from tests.models.made import tiny_llama
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("targets", {"tau": 0.2}, "tau"),
        ("targets", {"seed": 5}, "seed"),
        ("targets", {"method": "multinomial"}, "method"),
        ("targets", {"nll": False}, "nll"),
        ("targets", {"positions": "entropy", "min_entropy": 1.0}, "positions"),
        ("teacher", {"micro_batch": 4}, "micro_batch"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused_by_name(
    single, corpus, section, values, named
):
    import contextlib

    from megadistill.cache.build import _prepare

    config = settings(corpus, single, **{section: values})
    with contextlib.ExitStack() as held, pytest.raises(RecipeError, match=named):
        _prepare(config, held)


def test_before_the_first_block_micro_batch_may_change_as_after_running_out_of_memory(
    corpus, tmp_path
):
    import contextlib

    from megadistill.cache.build import _prepare

    for size in (8, 2):
        config = settings(corpus, tmp_path / "cache", teacher={"micro_batch": size})
        with contextlib.ExitStack() as held:
            missing = _prepare(config, held)
            store = open_store(tmp_path / "cache")
            assert store.recipe["micro_batch"] == size
            assert missing == list(range(store.num_blocks))


def test_another_teacher_under_the_same_path_is_refused(corpus, tmp_path, single):
    from megadistill.cache.cache_recipe import model_identity

    other = Path(tiny_llama(tmp_path / "other", seed=1))
    assert model_identity(other)["weights"] != model_identity(corpus / "teacher")["weights"]
    assert model_identity(other)["config"] == model_identity(corpus / "teacher")["config"]


def test_validation_notices_a_teacher_that_says_something_else(single, corpus, tmp_path):
    found = run_ranks(
        1, "tests.cache.test_build_again:validate_with_noise", config=settings(corpus, single)
    )[0]
    assert "scored" in found
    assert "other token ids" in found


def validate_with_noise(mesh, config: Config) -> str:
    import torch

    from megadistill.cache.build import _validate
    from megadistill.errors import TeacherError
    from megadistill.teacher.engine import load_teacher

    vocab_size = open_store(config.cache.dir).recipe["vocab_size"]
    teacher = load_teacher(config, mesh, vocab_size=vocab_size)
    teacher.head.weight_VH.add_(torch.randn_like(teacher.head.weight_VH), alpha=0.5)
    try:
        _validate(config, mesh, teacher, open_store(config.data.dir), open_store(config.cache.dir))
    except TeacherError as error:
        return str(error)
    return "nothing noticed"


def test_the_first_durable_blocks_give_size_pace_and_time_remaining(single, corpus, tmp_path):
    config = settings(corpus, tmp_path / "cache")
    logged = run_ranks(2, "tests.cache.test_build_again:lines_of_progress", config=config)
    assert logged[1] == []
    (line,) = logged[0]
    found = re.fullmatch(
        r"cache: ([\d.]+) KiB when complete \([\d.]+ (?:KiB|bytes), about [\d.]+ s remaining\); "
        r"([\d.]+) bytes per token on disk, [\d,]+ tokens/s",
        line,
    )
    # Which blocks were durable first is up to the ranks: the estimate is a mean over some of them.
    store, tokens = open_store(single), open_store(corpus / "tokens")
    rates = []
    for block in range(store.num_blocks):
        samples = tokens.block(block)
        padding = sum(int(sample["padding"]) for sample in samples)
        rates.append(block_bytes(store, block) / (len(samples) * SEQ_LEN - padding))
    assert min(rates) - 0.005 <= float(found[2]) <= max(rates) + 0.005
    total = sum(len(s["tokens"]) - int(s["padding"]) for s in tokens)
    assert float(found[1]) == pytest.approx(float(found[2]) * total / 1024, abs=0.1)


def lines_of_progress(mesh, config: Config) -> list[str]:
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("megadistill.cache.generation_progress")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        build(mesh, config)
    finally:
        log.removeHandler(handler)
    return lines


def test_a_cache_does_again_the_blocks_that_growing_has_changed(corpus, tmp_path):
    data = {"dir": str(tmp_path / "tokens"), "max_samples": 30, "block_size": 2}
    config = settings(corpus, tmp_path / "cache", data=data)
    run_ranks(1, "tests.cache.building:build", config=config)
    before = open_store(tmp_path / "tokens").tokens_xxh3().tolist()
    ids_bin = (tmp_path / "cache" / "ids.bin").read_bytes()
    grown = settings(corpus, tmp_path / "cache", data={**data, "max_samples": None})
    (built,) = run_ranks(1, "tests.cache.building:build", config=grown)
    tokens, cache = open_store(tmp_path / "tokens"), open_cache(tmp_path / "cache")
    after = tokens.tokens_xxh3().tolist()
    same = sum(a == b for a, b in zip(before, after, strict=False))
    assert built.computed_blocks == len(after) - same
    assert same < len(before)
    assert cache.complete()
    assert cache.verify() == []
    assert cache.store.tokens_xxh3().tolist() == after
    assert (tmp_path / "cache" / "ids.bin").read_bytes() == ids_bin
    again = settings(corpus, tmp_path / "again", data={**data, "max_samples": None})
    run_ranks(1, "tests.cache.building:build", config=again)
    other = open_cache(tmp_path / "again")  # its ids.bin ranks ids by all of the text
    assert len(other) == len(cache)
    for i in range(len(cache)):
        (found, expected) = (each[i]["targets"].numpy() for each in (cache, other))
        np.testing.assert_array_equal(found.counts, expected.counts)
        assert _equal_rows(found, expected) == (expected.counts > 0).sum()
