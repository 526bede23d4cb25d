"""A divergence and an optimizer that another distribution registers, in a training run."""

import json

import numpy as np
import pytest
import torch

from megadistill.config.load import load_config
from megadistill.errors import ConfigError
from megadistill.student.loss.divergences import divergence_of
from megadistill.train.optimizers import chosen_optimizer
from tests.outside import installed
from tests.ranks import run_ranks
from tests.train.checkpoint.test_universal import cut
from tests.train.outside import training_distribution
from tests.train.plain import plain_steps
from tests.train.stores import make_config, make_store

ON_RANKS = "tests.train.outside:on_ranks"


@pytest.fixture
def outside(tmp_path):
    folder = training_distribution(tmp_path / "site-packages")
    with installed(folder):
        yield str(folder)


def run(world, outside, name, config):
    return run_ranks(
        world, ON_RANKS, folder=outside, work=f"tests.train.runs:{name}", config=config
    )


def test_both_train_as_a_plain_torch_loop_does_and_name_the_ranks_they_resume_at(outside, tmp_path):
    make_store(tmp_path / "cache", seed=1, method="topk")
    loss = {"divergence": "hellinger", "ce_weight": 0.5}
    train = {"optimizer": "momentum", "optimizer_options": {"momentum": 0.5}}
    config = make_config(
        tmp_path,
        loss={**loss, "kd_weight": 0.5, "options": {"scale": 2.0}},
        train={**train, "save_every": 2, "keep": 9},
    )
    plain = make_config(tmp_path, loss={**loss, "kd_weight": 1.0}, train=train)
    expected, _ = plain_steps(plain, make=lambda groups: torch.optim.SGD(groups, momentum=0.5))
    assert run(2, outside, "run", config) == [4, 4]
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    found = [[line["loss"], line["grad_norm"]] for line in lines]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all("kl" not in line for line in lines)  # the divergence is another

    # Momentum is no state that a universal checkpoint holds.
    stopped = cut(config, 2)
    kind, said = run(1, outside, "message", stopped)[0]
    assert kind == "TrainError"
    assert "was written by 2 rank(s), found 1 here: the state of train.optimizer=momentum" in said
    assert run(2, outside, "run", stopped) == [4, 4]
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        resumed = [json.loads(line) for line in file]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in lines]


def test_options_that_are_not_there_are_refused_by_name(outside, tmp_path):
    train = {"optimizer": "momentum", "optimizer_options": {"beta": 0.5}}
    with pytest.raises(ConfigError, match=r"^train.optimizer_options.beta: no such option of mome"):
        chosen_optimizer(make_config(tmp_path, train=train).train)
    with pytest.raises(
        ConfigError, match=r"^loss.options.size: no such parameter of hellinger, ex"
    ):
        divergence_of("hellinger", options={"size": 1})
    with pytest.raises(ConfigError, match=r"^loss.options.scale: expected a number, found 'x'"):
        divergence_of("hellinger", options={"scale": "x"})


def test_a_name_is_known_while_installed_and_its_object_when_it_is_used(outside, tmp_path):
    with pytest.raises(ConfigError, match=r"wrong of outside|outside-megadistill 1.2 is a str"):
        divergence_of("wrong")
    with pytest.raises(
        ConfigError, match=r"divergence missing of outside-megadistill 1.2 cannot b"
    ):
        divergence_of("missing")
    assert make_config(tmp_path, loss={"divergence": "missing"}).loss.divergence == "missing"


def test_a_name_that_is_not_installed_is_refused_with_the_nearest(tmp_path):
    for key, name, near in (
        ("loss.divergence", "helinger", None),
        ("loss.divergence", "forward-kl", "forward_kl"),
        ("train.optimizer", "adam", "adamw"),
    ):
        with pytest.raises(ConfigError) as raised:
            load_config("demo.yaml", [f"{key}={name}"])
        hint = f", did you mean {near}?" if near else ""
        assert f"{key}: expected one of " in str(raised.value)
        assert f"found {name!r}{hint}" in str(raised.value)
