"""Checkpoints and the run's folder: what is believed, and what is refused."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest

from megadistill.errors import TrainError
from megadistill.train import checkpoint
from megadistill.train.checkpoint import latest
from tests.ranks import run_ranks
from tests.train.stores import make_config

RUN, MESSAGE = "tests.train.runs:run", "tests.train.runs:message"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = make_config(
        tmp_path_factory.mktemp("run"), train={"save_every": 1, "keep": 3, "steps": 5, "ema": True}
    )
    run_ranks(2, RUN, config=config)
    return config


@pytest.fixture
def copied(finished, tmp_path):
    """The checkpoints of a run, to be damaged."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(f"{finished.train.out_dir}/checkpoints", folder)
    return folder


def test_the_newest_are_kept(copied):
    assert sorted(step for step, _ in checkpoint.checkpoints(copied)) == [3, 4, 5]
    newest = latest(copied)
    position = newest.position
    assert (newest.path.name, newest.world) == ("step-000005", 2)
    assert (position.step, position.sequences, position.tokens) == (5, 40, 640)


def flip(file: Path):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_in_any_file_makes_the_checkpoint_before_it_the_newest(copied, caplog):
    names = sorted(p.name for p in (copied / "step-000005").iterdir())
    assert len(names) == 9
    for name in names:
        file = copied / "step-000005" / name
        sound = file.read_bytes()
        flip(file)
        with caplog.at_level(logging.WARNING):
            assert latest(copied).position.step == 4
        assert "checkpoint of step 5 is passed over" in caplog.text
        assert name in caplog.text
        caplog.clear()
        file.write_bytes(sound)
    assert latest(copied).position.step == 5


def test_a_checkpoint_that_lacks_a_file_is_passed_over(copied):
    (copied / "step-000005" / "manifest.json").unlink()
    (copied / "step-000004" / "random-00001.pt").unlink()
    assert latest(copied).position.step == 3


def test_nothing_sound_is_an_error_and_not_a_fresh_start(copied):
    for step in (3, 4, 5):
        (copied / f"step-{step:06d}" / "manifest.json").unlink()
    with pytest.raises(TrainError, match=r"none of its 3 checkpoint\(s\) is sound"):
        latest(copied)


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert latest(tmp_path / "none") is None


def test_a_damaged_checkpoint_is_trained_again_from_the_one_before(finished, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished.train.out_dir, folder)
    shutil.rmtree(folder / "model")
    flip(folder / "checkpoints/step-000005/zero_pp_rank_1_mp_rank_00_optim_states.pt")
    train = finished.train.model_copy(update={"out_dir": str(folder)})
    assert run_ranks(2, RUN, config=finished.model_copy(update={"train": train})) == [5, 5]
    for name in ("model/model.safetensors", "model/config.json"):
        assert (folder / name).read_bytes() == Path(finished.train.out_dir, name).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (Path(f) / "metrics.jsonl").read_text().splitlines()]
        for f in (folder, finished.train.out_dir)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("section", "key", "value", "shown"),
    [
        ("train", "lr", 0.5, r"train\.lr is 0\.01, this run's is 0\.5"),
        ("train", "steps", 9, r"train\.steps is 5, this run's is 9"),
        ("train", "global_batch", 16, r"train\.global_batch is 8, this run's is 16"),
        ("loss", "ce_weight", 0.1, r"loss\.ce_weight is 0\.5, this run's is 0\.1"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused_by_name(
    finished, section, key, value, shown
):
    changed = getattr(finished, section).model_copy(update={key: value})
    config = finished.model_copy(update={section: changed})
    (kind, text), _ = run_ranks(2, MESSAGE, config=config)
    assert kind == "RecipeError"
    assert re.search(shown, text)
    assert "or choose another train.out_dir" in text


def test_a_run_that_died_in_its_first_save_starts_again(finished, tmp_path):
    """Nothing of it has a checkpoint's name; what it left is removed, not loaded."""
    folder = tmp_path / "out"
    shutil.copytree(finished.train.out_dir, folder)
    shutil.rmtree(folder / "model")
    (folder / "checkpoints/step-000005").rename(folder / "checkpoints/.saving")
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoints/step-{step:06d}")
    train = finished.train.model_copy(update={"out_dir": str(folder)})
    assert run_ranks(2, RUN, config=finished.model_copy(update={"train": train})) == [5, 5]
    assert {p.name for p in (folder / "checkpoints").iterdir() if p.is_dir()} == {
        f"step-{step:06d}" for step in (3, 4, 5)
    }
    for name in ("model/model.safetensors", "model/config.json"):
        assert (folder / name).read_bytes() == Path(finished.train.out_dir, name).read_bytes()
