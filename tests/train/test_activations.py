"""Activation checkpointing under ZeRO-3: the same numbers, and less kept for the backward pass."""

import logging

import numpy as np
import pytest

from megadistill.train.run import prepare
from tests.models.made import tiny_llama
from tests.ranks import run_ranks
from tests.train.stores import VOCAB, make_config
from tests.train.test_loop import elsewhere, series, weights

RUN, BACKWARD = "tests.train.runs:run", "tests.train.runs:one_backward"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny_llama(folder / "model", vocab_size=VOCAB, num_hidden_layers=6)
    return make_config(folder)


@pytest.mark.parametrize("world", [1, 2])
def test_losses_and_gradients_are_the_same_and_a_fifth_is_kept(config, world):
    plain = run_ranks(world, BACKWARD, config=config)
    again = run_ranks(
        world, BACKWARD, config=elsewhere(config, "again", activation_checkpointing=True)
    )
    for (loss, gradients, kept), (expected, theirs, all_kept) in zip(again, plain, strict=True):
        assert loss == expected
        assert gradients.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(gradients[name], value)
        assert kept < all_kept / 5


def test_deepspeeds_own_section_is_said_to_change_nothing(config, caplog):
    from types import SimpleNamespace

    section = {"activation_checkpointing": {"cpu_checkpointing": True}}
    mesh = SimpleNamespace(rank=0, world=1, run_on_rank0=lambda function: function())
    with caplog.at_level(logging.WARNING):
        prepare(config.model_copy(update={"deepspeed": section}), mesh)
    assert "it changes nothing here; train.activation_checkpointing=true is what" in caplog.text


@pytest.mark.long
def test_a_run_may_turn_it_on_or_off_between_its_parts(config):
    run_ranks(2, RUN, config=config)
    from tests.train.checkpoint.test_universal import cut

    whole = elsewhere(config, "whole", activation_checkpointing=True, save_every=1, keep=9)
    run_ranks(2, RUN, config=whole)
    assert series(whole) == series(config)
    for name, value in weights(config).items():
        assert (weights(whole)[name] == value).all()
    cut(whole, 2)
    train = whole.train.model_copy(update={"activation_checkpointing": False})
    run_ranks(2, RUN, config=whole.model_copy(update={"train": train}))
    assert series(whole) == series(config)
