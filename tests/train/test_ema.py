"""The moving average under ZeRO-3, against the plain formula on whole parameters."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.train.averages import AllShapes
from tests.train.checkpoint.test_universal import cut, odd_config
from tests.train.stores import make_config, make_store

RUN, MESSAGE = "tests.train.runs:run", "tests.train.runs:message"
SHAPES = "tests.train.averages:averages"


def plain_average(series, decay):
    """The average after a list of whole parameters, the first of them where training began."""
    average = {name: value.double() for name, value in series[0].items()}
    for t, weights in enumerate(series[1:]):
        d = min(decay, (1 + t) / (10 + t))
        average = {n: d * average[n] + (1 - d) * weights[n].double() for n in average}
    return average


def whole(config, step):
    """The weights in a checkpoint, put together by DeepSpeed's own tool."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = f"{config.train.out_dir}/checkpoints"
    state = get_fp32_state_dict_from_zero_checkpoint(folder, tag=f"step-{step:06d}")
    return {name.removeprefix("model."): value for name, value in state.items()}


def exported(config, name="model"):
    return load_file(f"{config.train.out_dir}/{name}/model.safetensors")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    config = odd_config(tmp_path_factory.mktemp("ema"), ema=True, use_ema=True, ema_decay=0.4)
    assert run_ranks(2, RUN, config=config) == [8, 8]
    return config


def test_the_exported_average_is_that_of_the_formula(averaged):
    start = load_file(f"{averaged.student.model}/model.safetensors")
    series = [start, *(whole(averaged, step) for step in range(1, 9))]
    expected = plain_average(series, 0.4)  # (1 + t) / (10 + t) passes 0.4 at t = 5
    found = exported(averaged)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # The data has 96 ids, and the export no row above.
        rows = expected[name][: len(value)]
        torch.testing.assert_close(value.double(), rows, rtol=1e-6, atol=1e-7)
        assert not torch.equal(value, series[-1][name][: len(value)])


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_an_average_is_resumed_at_any_number_of_ranks(averaged, world):
    config = cut(averaged, 5, f"resumed{world}")
    assert run_ranks(world, RUN, config=config) == [8] * world
    for name, value in exported(config).items():
        expected = exported(averaged)[name]
        if world == 2:
            assert torch.equal(value, expected)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


def test_training_is_the_same_with_an_average_as_without(averaged):
    plain = odd_config(Path(averaged.train.out_dir).parent)
    plain = plain.model_copy(
        update={"train": plain.train.model_copy(update={"out_dir": f"{plain.train.out_dir}-plain"})}
    )
    run_ranks(2, RUN, config=plain)
    for step in range(1, 9):
        for name, value in whole(plain, step).items():
            assert torch.equal(value, whole(averaged, step)[name])


@pytest.mark.long
def test_the_average_is_evaluated_where_it_is_asked_for(averaged, tmp_path):
    """In one run of the weights and one of the average; then both exports from scratch."""
    make_store(tmp_path / "heldout", method="topk", seed=5)
    folder = Path(averaged.train.out_dir).parent
    found = {}
    for use in (True, False):
        train = averaged.train.model_copy(
            update={"out_dir": str(tmp_path / f"out{use}"), "use_ema": use, "eval_every": 3}
        )
        evaluation = averaged.eval.model_copy(update={"cache": str(tmp_path / "heldout")})
        config = averaged.model_copy(update={"train": train, "eval": evaluation})
        run_ranks(2, RUN, config=config)
        text = Path(train.out_dir, "eval.jsonl").read_text()
        found[use] = json.loads(text.splitlines()[-1])["loss"]
        model = folder / f"again{use}"
        shutil.copytree(f"{train.out_dir}/model", model)
        student = config.student.model_copy(update={"model": str(model)})
        again = run_ranks(
            1, "tests.train.runs:held_out", config=config.model_copy(update={"student": student})
        )
        np.testing.assert_allclose(again[0]["loss"], found[use], rtol=1e-6)
        # Evaluating the average in between has changed no weight.
        for name, value in whole(config, 8).items():
            assert torch.equal(value, whole(averaged, 8)[name])
    assert abs(found[True] - found[False]) > 1e-4


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scalars_and_odd_shapes_are_averaged_and_dealt_anew(tmp_path, dtype):
    made = {"folder": str(tmp_path), "dtype": dtype}
    saved, weights = run_ranks(2, SHAPES, **made, written_by=None)[0]
    assert {name: value.shape for name, value in saved.items()} == AllShapes.SHAPES
    series = [{n: torch.as_tensor(v) for n, v in step.items()} for step in weights]
    # In bfloat16 the average is put in place rounded; it is kept in float32 all the same.
    tolerance = 2**-8 if dtype == "bfloat16" else 1e-6
    for name, value in plain_average(series, 0.3).items():
        np.testing.assert_allclose(saved[name], value.numpy(), rtol=tolerance, atol=1e-8)
    for world in (1, 3, 4):
        for found, _ in run_ranks(world, SHAPES, **made, written_by=2):
            for name, value in found.items():
                np.testing.assert_array_equal(value, saved[name])


def test_an_error_with_the_average_in_place_asks_nothing_of_the_other_ranks(tmp_path):
    """Told to stop while exporting, a rank died of the collective that was to put weights back."""
    config = make_config(tmp_path, train={"ema": True, "use_ema": True})
    assert run_ranks(2, "tests.train.averages:error_with_the_average", config=config) == [0, 0]


def test_a_checkpoint_without_an_average_does_not_become_one_with(tmp_path):
    config = make_config(tmp_path, train={"save_every": 1})
    run_ranks(2, RUN, config=config)
    shutil.rmtree(f"{config.train.out_dir}/model")
    train = config.train.model_copy(update={"ema": True})
    (kind, text), _ = run_ranks(2, MESSAGE, config=config.model_copy(update={"train": train}))
    assert kind == "RecipeError"
    assert "train.ema" in text
