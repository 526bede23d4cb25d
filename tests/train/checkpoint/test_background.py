"""Checkpoints written while training continues: whole or not there, and of the step they name."""

import shutil
from pathlib import Path

import pytest

from megadistill.train import checkpoint
from tests.ranks import run_ranks
from tests.train.checkpoint.test_universal import cut
from tests.train.stores import make_config
from tests.train.survive import Death, die, finish, make_run, newest_step, result
from tests.train.test_loop import elsewhere, series, weights

RUN, SLOW, FULL = (
    f"tests.train.runs:{n}" for n in ("run", "run_with_slow_saves", "run_with_a_full_disk")
)
SAVES = {"save_every": 2, "keep": 10, "steps": 8, "ema": True, "use_ema": True}


def test_training_goes_on_while_a_checkpoint_is_written_and_what_is_written_is_its_step(tmp_path):
    config = make_config(tmp_path, train=SAVES)
    run_ranks(2, RUN, config=config)
    slow = elsewhere(config, "slow", save_in_background=True)
    for lines, named in run_ranks(2, SLOW, config=slow, lines=4):
        assert (lines, named) == (
            4,
            0,
        )  # two steps later, with nothing that looks like a checkpoint
    assert series(slow) == series(config)
    for step in (2, 4, 6):
        again = elsewhere(slow, f"from{step}")
        shutil.copytree(slow.train.out_dir, again.train.out_dir)
        cut(again, step)
        assert checkpoint.latest(run_checkpoints(again)).position.step == step
        assert run_ranks(2, RUN, config=again) == [8, 8]
        assert series(again) == series(config)
        for name, value in weights(config).items():
            assert (weights(again)[name] == value).all()


@pytest.mark.long
def test_it_is_converted_to_another_number_of_ranks_as_any(tmp_path):
    config = make_config(tmp_path, train=SAVES | {"save_in_background": True})
    run_ranks(2, RUN, config=config)
    whole = series(config)
    cut(config, 4)
    run_ranks(1, RUN, config=config)
    for found, expected in zip(series(config), whole, strict=True):
        assert all(abs(a - b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_a_save_that_fails_on_one_rank_stops_all_and_the_one_before_is_there(tmp_path):
    config = make_config(tmp_path, train=SAVES | {"save_in_background": True})
    for kind, text in run_ranks(2, FULL, config=config):
        assert kind == "TrainError"
        assert "cannot write: No space left on device" in text
    assert checkpoint.latest(run_checkpoints(config)).position.step == 2
    assert run_ranks(2, RUN, config=config) == [8, 8]


@pytest.mark.parametrize(
    ("point", "rank"),
    [
        pytest.param("before the background has written", 0, marks=pytest.mark.long),
        pytest.param("when the background has written", 1, marks=pytest.mark.long),
        pytest.param("inside the manifest", 0, marks=pytest.mark.long),
    ],
)
def test_killed_while_it_is_written_the_run_goes_on_from_the_one_before(tmp_path, point, rank):
    whole = make_run(tmp_path)
    finish(whole, tmp_path / "whole", tmp_path / "notes")
    file, out = make_run(tmp_path, save_in_background=True), tmp_path / "out"
    nth = 12 if point == "inside the manifest" else 2  # of some ten files a checkpoint
    die(file, out, tmp_path / "dying", Death(point, rank, nth))
    assert newest_step(out) == 2
    assert "resumed at step 2 of 8" in finish(file, out, tmp_path / "again")
    assert result(out) == result(tmp_path / "whole")


def test_told_to_stop_it_leaves_with_the_checkpoint_written(tmp_path):
    train = SAVES | {"save_in_background": True, "save_every": None}
    config = make_config(tmp_path, train=train)
    done = run_ranks(2, "tests.train.runs:run_until_told", config=config, lines=3)
    assert checkpoint.latest(run_checkpoints(config)).position.step == done[0] >= 3
    assert run_ranks(2, RUN, config=config) == [8, 8]


def run_checkpoints(config):
    return Path(config.train.out_dir) / "checkpoints"
