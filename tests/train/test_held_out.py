"""Held-out text in one key: generating makes its cache, training evaluates on it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.cache.reader import open_cache
from megadistill.cli.command_line import run
from megadistill.config import Config
from megadistill.config.held_out import held_out
from megadistill.config.load import validate
from megadistill.errors import ConfigError
from megadistill.models.packed_sequences import sample_labels
from megadistill.preflight import check_generate, check_train
from tests.cache.building import hashes
from tests.config.test_rules import changed
from tests.models.made import teacher_and_text, tiny_model
from tests.programs import program
from tests.ranks import RankError, run_ranks

BUILD, RERUN = "tests.cache.building:build", "tests.cache.building:rerun"
SEQ_LEN = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, a student, text to train on and other text."""
    made = teacher_and_text(tmp_path_factory.mktemp("held-out"), documents=120)
    tiny_model(made / "student", seed=3)
    words = "seven grey wizards quietly judge my vow of jade box and quartz number %d"
    lines = [json.dumps({"text": words % i}) for i in range(60)]
    (made / "other.jsonl").write_text("\n".join(lines))
    return made


def settings(folder: Path, place: Path, **sections) -> Config:
    keys = {
        "data": {
            "files": [str(folder / "text.jsonl")],
            "dir": str(place / "tokens"),
            "seq_len": SEQ_LEN,
            "block_size": 8,
            "workers": 1,
        },
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "micro_batch": 4},
        "cache": {"dir": str(place / "cache"), "min_free": 0},
        "student": {"model": str(folder / "student")},
        "train": {
            "out_dir": str(place / "run"),
            "steps": 4,
            "global_batch": 8,
            "micro_batch": 4,
            "eval_every": 2,
        },
        "eval": {"files": [str(folder / "other.jsonl")]},
    }
    for name, section in sections.items():
        keys[name] = {**keys[name], **section}
    return Config.model_validate(keys)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Config:
    """The configuration of a main and a held-out cache that two ranks have made."""
    config = settings(folder, tmp_path_factory.mktemp("made"))
    check_generate(config, world=2)
    run_ranks(2, BUILD, config=config)
    return config


def test_generating_makes_a_topk_cache_of_the_held_out_text_beside_the_main_one(made, folder):
    main, other = open_cache(made.cache.dir), open_cache(f"{made.cache.dir}.heldout")
    assert (main.recipe["method"], other.recipe["method"]) == ("varopt", "topk")
    assert other.complete()
    assert other.verify() == []
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    sample = other[0]
    first = slice(0, int([*sample["documents"], SEQ_LEN][1]))
    with torch.inference_mode():
        ids = torch.tensor(sample["tokens"][first].astype(np.int64))[None]
        best = teacher(ids).logits[0].topk(64).indices
    ids_NK, _ = sample["targets"].padded()
    for position in range(first.stop - 1):
        assert set(best[position].tolist()) <= set(ids_NK[position].tolist())


def test_training_evaluates_on_it_with_no_further_key(made, folder):
    check_train(made, world=2)
    assert run_ranks(2, "tests.train.runs:run", config=made) == [4, 4]
    lines = (Path(made.train.out_dir) / "eval.jsonl").read_text().splitlines()
    figures = [json.loads(line) for line in lines]
    assert [f["step"] for f in figures] == [2, 4]
    other = open_cache(f"{made.cache.dir}.heldout")
    valid = [(sample_labels(sample) != -100).sum() for sample in other]
    assert [f["positions"] for f in figures] == [sum(valid)] * 2
    assert all(math.isfinite(f["kl"]) and f["kl"] > 0 for f in figures)


def test_generating_again_loads_no_teacher_and_changes_no_file(made):
    folders = [Path(made.cache.dir), Path(f"{made.cache.dir}.heldout")]
    before = [hashes(each) for each in folders]
    run_ranks(2, RERUN, config=made)
    assert [hashes(each) for each in folders] == before


def test_a_held_out_cache_that_is_missing_is_made_to_a_main_one_that_is_there(
    made, folder, tmp_path
):
    config = settings(folder, tmp_path, eval={"files": None})
    run_ranks(1, BUILD, config=config)
    assert not Path(f"{config.cache.dir}.heldout").exists()
    before = hashes(Path(config.cache.dir))
    run_ranks(1, BUILD, config=settings(folder, tmp_path))
    assert hashes(Path(config.cache.dir)) == before
    assert hashes(Path(f"{config.cache.dir}.heldout")) == hashes(Path(f"{made.cache.dir}.heldout"))


def test_of_several_parts_the_first_makes_the_held_out_cache(folder, tmp_path):
    for part in range(2):
        place = {"dir": str(tmp_path / f"part{part}"), "part": f"{part}/2"}
        run_ranks(1, BUILD, config=settings(folder, tmp_path, cache=place))
    assert open_cache(tmp_path / "part0.heldout").complete()
    assert not (tmp_path / "part1.heldout").exists()
    tool = program("tools/merge_and_inspect.py").main
    parts = [str(tmp_path / "part0"), str(tmp_path / "part1")]
    assert run(tool, ["--out", str(tmp_path / "cache"), *parts]) == 0
    assert open_cache(tmp_path / "cache").complete()
    assert hashes(tmp_path / "cache.heldout") == hashes(tmp_path / "part0.heldout")
    check_train(settings(folder, tmp_path), world=1)


def test_with_the_teacher_online_generating_makes_the_held_out_cache_alone(folder, tmp_path):
    config = settings(folder, tmp_path, teacher={"mode": "online"})
    with pytest.raises(ConfigError, match=r"eval\.files: .*cache\.heldout does not exist"):
        check_train(config, world=1)
    check_generate(config, world=1)
    run_ranks(1, BUILD, config=config)
    assert not Path(config.cache.dir).exists()
    check_train(config, world=1)
    assert run_ranks(1, "tests.train.runs:run", config=config) == [4]
    assert len((tmp_path / "run/eval.jsonl").read_text().splitlines()) == 2


def test_what_is_wrong_with_the_held_out_text_is_said_in_its_own_key(folder, tmp_path):
    for files, said in (
        ([str(folder / "none.jsonl")], r"^eval\.files: "),
        ([str(folder / "*.jsonl")], r"^eval\.files: .*text\.jsonl is among the text that is trai"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_generate(settings(folder, tmp_path, eval={"files": files}), world=1)


def test_a_training_file_is_not_held_out_under_another_name_through_a_link_or_as_a_copy(
    folder, tmp_path, monkeypatch
):
    text = folder / "text.jsonl"
    (tmp_path / "link.jsonl").symlink_to(text)
    (tmp_path / "copy.jsonl").write_bytes(text.read_bytes())
    (tmp_path / "equally-long.jsonl").write_bytes(text.read_bytes()[::-1])
    monkeypatch.chdir(folder)
    for name in (
        "./text.jsonl",
        f"../{folder.name}/text.jsonl",
        tmp_path / "link.jsonl",
        tmp_path / "copy.jsonl",
    ):
        config = settings(folder, tmp_path, eval={"files": [str(name)]})
        with pytest.raises(
            ConfigError, match=r"^eval\.files: .* is among the text that is trained"
        ):
            check_generate(config, world=1)
    other = {"files": [str(tmp_path / "equally-long.jsonl")]}
    check_generate(settings(folder, tmp_path, eval=other), world=1)


def test_another_held_out_text_is_refused_in_its_own_key(made, folder, tmp_path):
    (tmp_path / "third.jsonl").write_text('{"text": "%s"}\n' % ("something else " * 99))
    place = Path(made.cache.dir).parent
    config = settings(folder, place, eval={"files": [str(tmp_path / "third.jsonl")]})
    ((kind, text),) = run_ranks(1, "tests.train.test_held_out:message", config=config)
    assert kind == "RecipeError"
    assert "eval.files is other.jsonl (" in text
    assert "this run's is third.jsonl (" in text


def message(mesh, config):
    from megadistill.cache.build import build_cache
    from megadistill.errors import MegadistillError

    try:
        build_cache(config, mesh)
    except MegadistillError as error:
        return type(error).__name__, str(error)
    return "", "no error"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["eval.files=[a]", "eval.cache=x"], "eval: eval.cache and eval.files are set, expected"),
        (["eval.files=[a]", "eval.name=x"], "eval.files and eval.name are set, expected one held"),
        (["eval.split=test"], "eval.split: is read with eval.name only"),
        (["eval.max_samples=5"], "eval.max_samples: documents of a held-out text that is not"),
        (["data.source=null", "data.name=x", "eval.name=x"], "eval.name: x is the text that is tr"),
        (["data.source=null", "data.files=[a, b]", "eval.files=[b]"], "eval.files: b is among the"),
        (["eval.files=[a]", "data.dir=w/cache.heldout"], "w/cache.heldout is the same folder as"),
        (
            ["eval.files=[a]", "teacher.mode=online", "targets.method=projected"],
            "eval.files: with targets.method=projected, whose teacher has other token ids",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(settings, said):
    config, found = validate(changed(*settings))
    assert config is None
    assert len(found) == 1, found
    assert said in str(found[0])


def test_another_split_or_a_best_checkpoint_need_nothing_more():
    for given in (
        ["data.source=null", "data.name=x", "eval.name=x", "eval.split=test"],
        ["eval.files=[a]", "train.keep_best=true"],
    ):
        _, found = validate(changed(*given))
        assert found == []


def test_the_held_out_cache_has_entries_of_topk_and_blocks_that_a_shard_holds():
    config, _ = validate(changed("eval.files=[a]", "targets.k=2000", "targets.positions=all"))
    made = held_out(config)
    assert (made.targets.method, made.targets.k) == ("topk", 2000)
    assert made.data.block_size < config.data.block_size
    assert made.data.seq_len == config.data.seq_len
    config, _ = validate(
        changed("eval.files=[a]", "targets.positions=entropy", "targets.min_entropy=1")
    )
    assert held_out(config).targets.positions is None


def test_a_mistake_in_the_held_out_text_is_found_before_the_other_text_is_tokenised(
    folder, tmp_path
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 7}\n')
    config = settings(folder, tmp_path, eval={"files": [str(bad)]})
    check_generate(config, world=1)
    with pytest.raises(RankError, match=r"eval\.files: .*bad\.jsonl"):
        run_ranks(1, BUILD, config=config)
    assert not (tmp_path / "tokens").exists()
    assert not (tmp_path / "cache").exists()
