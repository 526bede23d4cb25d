"""The checkpoint of the lowest held-out loss: kept beside the newest, and exported."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megadistill.train import checkpoint
from tests.ranks import run_ranks
from tests.train.checkpoint.test_checkpoint import flip
from tests.train.stores import make_config, make_store
from tests.train.test_ema import whole

RUN = "tests.train.runs:run"


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """A run whose held-out loss falls and then rises, with checkpoints of every other step."""
    folder = tmp_path_factory.mktemp("run")
    make_store(folder / "heldout", method="topk", seed=5)
    config = make_config(
        folder,
        eval={"cache": str(folder / "heldout")},
        train={
            "steps": 10,
            "eval_every": 1,
            "save_every": 2,
            "keep": 2,
            "keep_best": True,
            "schedule": "constant",
            "lr": 3e-2,
        },
    )
    assert run_ranks(2, RUN, config=config) == [10, 10]
    return config


def held_out(config):
    lines = Path(config.train.out_dir, "eval.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def exported(config, name):
    return load_file(f"{config.train.out_dir}/{name}/model.safetensors")


def test_the_best_is_kept_beside_the_newest(overfitted):
    losses = held_out(overfitted)
    best = min(losses, key=losses.get)
    assert 1 < best < 8, losses
    folder = Path(overfitted.train.out_dir, "checkpoints")
    kept = {step for step, _ in checkpoint.checkpoints(folder)}
    assert kept == {best, 8, 10}
    found = checkpoint.best(folder)
    assert (found.position.step, found.metrics["loss"]) == (best, losses[best])


def test_the_best_is_exported_and_the_last_stays_the_model(overfitted):
    losses = held_out(overfitted)
    best = min(losses, key=losses.get)
    for name, step in (("model_best", best), ("model", 10)):
        for key, value in exported(overfitted, name).items():
            assert torch.equal(value, whole(overfitted, step)[key])
    card = Path(overfitted.train.out_dir, "model_best/README.md").read_text()
    assert f"- steps: {best}," in card
    assert f"loss {losses[best]:.4g}" in card


def test_a_resumed_run_knows_the_lowest_loss_of_the_one_before(overfitted, tmp_path):
    losses = held_out(overfitted)
    best = min(losses, key=losses.get)
    folder = tmp_path / "out"
    shutil.copytree(overfitted.train.out_dir, folder)
    for name in ("model", "model_best"):
        shutil.rmtree(folder / name)
    shutil.rmtree(folder / "checkpoints/step-000010")
    train = overfitted.train.model_copy(update={"out_dir": str(folder)})
    config = overfitted.model_copy(update={"train": train})
    assert run_ranks(1, RUN, config=config) == [10]
    kept = {step for step, _ in checkpoint.checkpoints(folder / "checkpoints")}
    assert kept == {best, 8, 10}
    for key, value in exported(config, "model_best").items():
        assert torch.equal(value, exported(overfitted, "model_best")[key])


def test_a_damaged_best_is_said_and_no_other_takes_its_name(overfitted, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    shutil.copytree(f"{overfitted.train.out_dir}/checkpoints", folder)
    flip(next(checkpoint.best(folder).path.glob("*_optim_states.pt")))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.best(folder) is None
    assert "the best checkpoint is passed over" in caplog.text
    assert checkpoint.latest(folder).position.step == 10
