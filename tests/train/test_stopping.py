"""A signal finishes the step, saves it where a save fits, and a line says where it resumes."""

from __future__ import annotations

import signal

import pytest
import torch

from megadistill.train.stopping import Standing
from tests.ranks import run_ranks
from tests.train.stores import make_config, make_store
from tests.train.test_loop import elsewhere, series, weights
from tests.train.test_run_folder import saved

LONG = [pytest.mark.long, pytest.mark.runs]
RUN, STOPPED = "tests.train.runs:run", "tests.train.runs:run_and_be_stopped"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    config = make_config(tmp_path_factory.mktemp("run"), train={"steps": 6})
    assert run_ranks(2, RUN, config=config) == [6, 6]
    return config


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=LONG),
        pytest.param(signal.SIGHUP, 129, marks=LONG),
    ],
)
def test_a_signal_saves_the_step_and_the_run_ends_the_same_to_the_bit(undisturbed, number, code):
    """Without a save so far it is tried, however long it will take."""
    config = elsewhere(undisturbed, signal.Signals(number).name)
    found = run_ranks(2, STOPPED, config=config, step=3, number=number, save_s=100.0)
    assert [each for each, _ in found] == [code, code]
    assert found[0][1][-1] == "stopped at step 3 of 6: saved; the same command resumes there"
    assert found[1][1] == []
    assert saved(config) == [3]
    assert run_ranks(2, RUN, config=config) == [6, 6]
    assert series(config) == series(undisturbed)
    for name, value in weights(config).items():
        assert torch.equal(value, weights(undisturbed)[name])


@pytest.mark.parametrize(("save_s", "steps"), [(100.0, [2]), (1.0, [2, 3])])
def test_after_a_signal_a_save_is_made_only_where_the_last_ones_time_fits(
    undisturbed, save_s, steps
):
    config = elsewhere(undisturbed, f"slow-{save_s}", save_every=2)
    found = run_ranks(2, STOPPED, config=config, step=3, number=signal.SIGINT, save_s=save_s)
    assert [code for code, _ in found] == [130, 130]
    assert saved(config) == steps
    line = found[0][1][-1]
    if len(steps) == 1:
        expected = "stopped after step 3 of 6; last checkpoint: step 2; the same command resumes th"
        assert line.startswith(expected)
        assert "(a save takes 100.0 s, 1" in line
    else:
        assert line == "stopped at step 3 of 6: saved; the same command resumes there"


def test_a_signal_in_the_last_step_ends_a_finished_run_with_code_0(undisturbed):
    config = elsewhere(undisturbed, "last")
    found = run_ranks(2, STOPPED, config=config, step=6, number=signal.SIGINT, save_s=1.0)
    assert [code for code, _ in found] == [0, 0]
    assert weights(config).keys() == weights(undisturbed).keys()


@pytest.mark.parametrize("step", [pytest.param(step, marks=LONG) for step in (3, 6)])
def test_a_signal_in_an_evaluation_leaves_it_to_the_next_start(tmp_path, step):
    make_store(tmp_path / "heldout", method="topk", seed=5)
    config = make_config(
        tmp_path,
        eval={"cache": str(tmp_path / "heldout")},
        train={"steps": 6, "eval_every": 3, "keep_best": True, "keep": 9},
    )
    whole = elsewhere(config, "whole")
    assert run_ranks(2, RUN, config=whole) == [6, 6]
    found = run_ranks(2, STOPPED, config=config, step=step, number=signal.SIGTERM, save_s=1.0)
    assert [code for code, _ in found] == [143, 143]
    assert found[0][1][-1] == f"stopped at step {step} of 6: saved; the same command resumes there"
    assert (tmp_path / "out/eval.jsonl").read_text().count("\n") == step // 3 - 1
    assert run_ranks(2, RUN, config=config) == [6, 6]
    for name in ("eval.jsonl", "model/model.safetensors", "model_best/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert saved(config) == saved(whole)


def test_the_account_of_a_run_that_is_ended_in_the_middle_of_a_step():
    standing = Standing(step=0, steps=9)
    standing.step = 3
    assert standing.account() == (
        "stopped after step 3 of 9, no checkpoint yet: the same command starts at step 1"
    )
    sealed = [False]
    standing.save(3, lambda: sealed[0])
    assert standing.saved == 0  # still being written in the background
    sealed[0] = True
    standing.step = 5
    assert standing.account() == (
        "stopped after step 5 of 9; last checkpoint: step 3; the same command resumes there"
    )
    standing.step = 9
    standing.save(9, lambda: True)
    assert standing.account().endswith("before the model was exported: the same command exports it")
