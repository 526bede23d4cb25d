"""Resuming at another number of ranks: the same batches, the same numbers, nothing by hand."""

import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megadistill.errors import TrainError
from megadistill.train import checkpoint
from megadistill.train.checkpoint import universal
from tests.ranks import run_ranks
from tests.train.stores import make_config

RUN, MESSAGE, LOADED = (f"tests.train.runs:{n}" for n in ("run", "message", "optimizer_loaded"))
# Odd sizes: every matrix is padded at 2 and at 4 ranks, and the sub-groups of 400 elements cut the
# parameters differently at each number of them.
ODD = {"hidden_size": 30, "intermediate_size": 49, "num_attention_heads": 3}
SMALL = {"zero_optimization": {"sub_group_size": 400}}


def odd_config(folder, **train):
    from tests.models.made import tiny_llama

    tiny_llama(folder / "model", vocab_size=97, num_key_value_heads=1, **ODD)
    return make_config(
        folder,
        train={"save_every": 1, "keep": 10, "steps": 8, "micro_batch": 1, **train},
        deepspeed=SMALL,
    )


def series(config):
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    return [[line[k] for k in ("loss", "kd_loss", "ce_loss", "grad_norm")] for line in lines]


def weights(config):
    return load_file(f"{config.train.out_dir}/model/model.safetensors")


def cut(config, step, name=None):
    """The run as a kill after the save of `step` leaves it; with a name in another folder."""
    train = config.train
    if name is not None:
        train = train.model_copy(update={"out_dir": f"{train.out_dir}-{name}"})
        shutil.copytree(config.train.out_dir, train.out_dir)
    folder = Path(train.out_dir)
    shutil.rmtree(folder / "model")
    for later, path in checkpoint.checkpoints(folder / "checkpoints"):
        if later > step:
            shutil.rmtree(path)
    return config.model_copy(update={"train": train})


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    config = odd_config(tmp_path_factory.mktemp("run"))
    assert run_ranks(1, RUN, config=config) == [8]
    return config


@pytest.mark.long
def test_one_two_four_and_one_ranks_train_as_one_does(one):
    config = cut(one, 2, "elastic")
    assert run_ranks(2, RUN, config=config) == [8, 8]
    cut(config, 4)
    assert run_ranks(4, RUN, config=config) == [8] * 4
    cut(config, 6)
    assert run_ranks(1, RUN, config=config) == [8]
    np.testing.assert_allclose(series(config), series(one), rtol=0, atol=1e-5)
    for name, value in weights(config).items():
        torch.testing.assert_close(value, weights(one)[name], rtol=0, atol=1e-5)
    left = {
        path.name for path in Path(config.train.out_dir, "checkpoints").iterdir() if path.is_dir()
    }
    assert left == {f"step-{step:06d}" for step in range(1, 9)}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_groups_keep_their_own_settings_and_sub_groups_their_own_steps(one, world):
    config = cut(one, 3, f"loaded{world}")
    for decays, steps, places in run_ranks(world, LOADED, config=config):
        assert decays == [0.1, 0.0]
        assert len(steps) > 2
        assert set(steps) == {3.0}
        assert len(set(places)) == len(places), "two sub-groups share a step"


def test_what_a_run_that_died_converting_left_is_removed_at_any_number_of_ranks(one):
    config = cut(one, 7, "died")
    folder = Path(config.train.out_dir, "checkpoints/.universal/step-000007")
    folder.mkdir(parents=True)
    (folder / "half.pt").write_bytes(b"half")
    assert run_ranks(1, RUN, config=config) == [8]
    assert not folder.parent.exists()
    assert series(config) == series(one)


def test_a_checkpoint_of_another_number_of_ranks_is_verified_too(one, caplog):
    config = cut(one, 5, "damaged")
    file = next(Path(config.train.out_dir, "checkpoints/step-000005").glob("*_optim_states.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.latest(file.parent.parent)
    assert (found.position.step, found.world) == (4, 1)
    assert "checkpoint of step 5 is passed over" in caplog.text
    assert run_ranks(2, RUN, config=config) == [8, 8]
    np.testing.assert_allclose(series(config), series(one), rtol=0, atol=1e-5)


def test_a_disk_without_room_to_convert_is_one_line(one, tmp_path, monkeypatch):
    found = checkpoint.latest(Path(one.train.out_dir, "checkpoints"))
    monkeypatch.setattr(universal, "free_bytes", lambda path: 1000)
    with pytest.raises(
        TrainError, match=r"step-000008 takes .* the disk has 1000 bytes: make room"
    ):
        universal._convert(found.path, tmp_path / "room" / "step-000008")


@pytest.mark.long
def test_in_bfloat16_too_another_number_of_ranks_goes_on_alike(tmp_path):
    """Gradients added in bfloat16 had made it 1e-2 by then."""
    config = odd_config(tmp_path, steps=30, save_every=5)
    config = config.model_copy(update={"deepspeed": SMALL | {"bf16": {"enabled": True}}})
    run_ranks(1, RUN, config=config)
    resumed = cut(config, 5, "two")
    run_ranks(2, RUN, config=resumed)
    losses = [np.array(series(each))[:, 0] for each in (resumed, config)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-3)


def test_another_global_batch_is_refused_at_another_number_of_ranks(one):
    config = cut(one, 3, "batch")
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"global_batch": 16})}
    )
    for kind, text in run_ranks(2, MESSAGE, config=config):
        assert kind == "RecipeError"
        assert "train.global_batch is 8, this run's is 16" in text


@pytest.mark.long
@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_the_fifty_steps_after_another_number_of_ranks_agree(
    tmp_path, capsys, before, dtype, bound
):
    config = odd_config(tmp_path, steps=60, save_every=10)
    if dtype == "bfloat16":
        config = config.model_copy(update={"deepspeed": SMALL | {"bf16": {"enabled": True}}})
    run_ranks(before, RUN, config=config)
    for after in {1, 2, 4} - {before}:
        resumed = cut(config, 10, f"{after}")
        run_ranks(after, RUN, config=resumed)
        losses = [np.array(series(c))[:, 0] for c in (resumed, config)]
        apart = np.abs(losses[0] - losses[1])
        with capsys.disabled():
            sys.stdout.write(f"\n{dtype} {before} -> {after}: losses apart {apart.max():.1e}")
        assert apart.max() <= bound
