"""Numbers that are not finite: all ranks stop, or leave the step out, and name the sequences.

The student's embedding of one id is NaN, and one sequence has that id: the way broken data shows.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megadistill.train.checkpoint import checkpoints, latest
from tests.ranks import run_ranks
from tests.train.plain import plain_steps
from tests.train.stores import VOCAB, make_config, make_store

RUN, MESSAGE = "tests.train.runs:run", "tests.train.runs:message"
BAD = 13  # the sequence


def make_broken(folder, *, sequences=48, **train):
    make_store(folder / "cache", seed=1, sequences=sequences, only_in=BAD)
    config = make_config(folder, train={"steps": 6, "save_every": 1, "keep": 10, **train})
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][VOCAB - 1] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    return config


def lines(config):
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def settings(config, **train):
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    config = make_broken(tmp_path_factory.mktemp("skip"), non_finite="skip")
    assert run_ranks(2, RUN, config=config) == [6, 6]
    return config


def test_a_skipped_step_is_one_that_a_plain_loop_leaves_out(skipping):
    expected, parameters = plain_steps(skipping)
    found = [[line["loss"], line["grad_norm"]] for line in lines(skipping)]
    left_out = [step for step, (loss, _) in enumerate(expected) if loss is None]
    assert len(left_out) == 1
    assert found[left_out[0]] == [None, None]
    assert lines(skipping)[left_out[0]]["skipped"] is True
    for numbers in (found, expected):
        del numbers[left_out[0]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, value in load_file(f"{skipping.train.out_dir}/model/model.safetensors").items():
        torch.testing.assert_close(
            value, parameters[name].detach(), rtol=1e-4, atol=2e-5, equal_nan=True
        )


def test_the_same_is_skipped_at_another_number_of_ranks(skipping):
    config = settings(skipping, out_dir=f"{skipping.train.out_dir}-one")
    assert run_ranks(1, RUN, config=config) == [6]
    numbers = [
        [[line["loss"] or 0, line["grad_norm"] or 0] for line in lines(c)]
        for c in (config, skipping)
    ]
    np.testing.assert_allclose(*numbers, rtol=1e-5)


def test_by_default_all_ranks_stop_and_name_the_sequences_of_the_micro_batch(skipping):
    config = settings(skipping, out_dir=f"{skipping.train.out_dir}-stop", non_finite="stop")
    results = run_ranks(2, MESSAGE, config=config)
    assert results[0] == results[1]
    kind, text = results[0]
    assert kind == "TrainError"
    named = re.search(r"step \d: a loss is not finite; among sequences ([\d, ]+) of ", text)
    sequences = [int(number) for number in named[1].split(",")]
    assert BAD in sequences
    assert len(sequences) == config.train.micro_batch
    assert "lower train.lr, look at these sequences, or leave such steps out" in text


def test_it_is_skipped_with_optimizer_and_weights_on_the_host_and_averaged_and_resumed(
    skipping, tmp_path
):
    """All that ZeRO-3 offloads, at two ranks and then at one: the numbers of the plain loop."""
    host = {"device": "cpu"}
    offload = {"zero_optimization": {"offload_optimizer": host, "offload_param": host}}
    config = settings(skipping, out_dir=str(tmp_path / "out"), ema=True, use_ema=True)
    config = config.model_copy(update={"deepspeed": offload})
    run_ranks(2, RUN, config=config)
    average = load_file(tmp_path / "out/model/model.safetensors")
    shutil.rmtree(tmp_path / "out/model")
    for step, path in checkpoints(tmp_path / "out/checkpoints"):
        if step > 3:
            shutil.rmtree(path)
    assert run_ranks(1, RUN, config=config) == [6]
    numbers = [
        [[line["loss"] or 0, line["grad_norm"] or 0] for line in lines(c)]
        for c in (config, skipping)
    ]
    np.testing.assert_allclose(*numbers, rtol=1e-5)
    for name, value in load_file(tmp_path / "out/model/model.safetensors").items():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=2e-5, equal_nan=True)


def test_what_was_skipped_before_a_resume_counts(tmp_path):
    # Twenty-four sequences, six steps of eight: the bad one comes once in each half.
    config = make_broken(tmp_path, sequences=24, non_finite="skip", skip_budget=1)
    found = run_ranks(2, MESSAGE, config=config)
    assert found[0] == found[1]
    assert "it is step number 2 to be skipped, and train.skip_budget is 1" in found[0][1]
    folder = Path(config.train.out_dir, "checkpoints")
    assert latest(folder).position.skipped == 1
    first = min(line["step"] for line in lines(config) if line["loss"] is None)
    for step, path in checkpoints(folder):
        if step > first:
            shutil.rmtree(path)
    assert run_ranks(2, MESSAGE, config=config) == found
    assert run_ranks(2, RUN, config=settings(config, skip_budget=2)) == [6, 6]
    assert latest(folder).position.skipped == 2


def test_a_skipped_step_leaves_the_average_alone(tmp_path):
    config = make_broken(tmp_path, non_finite="skip", ema=True)
    run_ranks(2, RUN, config=config)
    steps = len(lines(config))
    for rank in range(2):
        file = Path(config.train.out_dir, f"checkpoints/step-{steps:06d}/ema-{rank:05d}.pt")
        assert torch.load(file)["updates"] == steps - 1


def test_a_loss_that_is_not_finite_has_no_finite_gradient_on_any_rank(tmp_path):
    config = make_config(tmp_path, train={"global_batch": 4})
    first, second = run_ranks(2, "tests.train.runs:gradient_of_an_infinite_loss", config=config)
    assert first == [(True, True, True), (True, False, False)]
    assert second == [(True, True, True), (False, False, False)]
