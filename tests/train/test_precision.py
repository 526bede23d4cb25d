"""float16: refused on a CPU, and what of its loss scaler can be seen on one."""

import itertools

import pytest
import torch

from megadistill.errors import ConfigError
from megadistill.train.hardware_checks import check_machine
from tests.ranks import run_ranks
from tests.train.stores import make_config, make_store

HALF = "tests.train.runs:half_precision"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which has float16")
def test_float16_is_refused_on_a_cpu_before_a_model_is_loaded(tmp_path):
    config = make_config(tmp_path, deepspeed={"fp16": {"enabled": True}})
    with pytest.raises(
        ConfigError, match=r"deepspeed\.fp16\.enabled: true, .* no GPU here, expected one"
    ):
        check_machine(config.deepspeed)
    for kind, text in run_ranks(1, "tests.train.runs:message", config=config):
        assert kind == "ConfigError"
        assert "\n" not in text
        assert text.startswith("deepspeed.fp16.enabled: true, and there is no GPU here, expected")
    assert not (tmp_path / "out").exists()
    check_machine({"bf16": {"enabled": True}})


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), *(pytest.param(*n, marks=pytest.mark.long) for n in ((1, 1), (2, 2), (1, 2)))],
)
def test_the_loss_scaler_goes_on_where_a_checkpoint_left_it(tmp_path, before, after):
    make_store(tmp_path / "cache", sequences=64, seed=1)
    half = {
        "fp16": {
            "enabled": True,
            "initial_scale_power": 20,
            "hysteresis": 1,
            "loss_scale_window": 2,
        }
    }
    config = make_config(tmp_path, deepspeed=half, train={"global_batch": 4, "micro_batch": 2})
    whole = config.model_copy(
        update={"train": config.train.model_copy(update={"out_dir": str(tmp_path / "whole")})}
    )
    (expected, last, dynamic), *_ = run_ranks(before, HALF, config=whole, steps=14)
    assert dynamic
    scales = [scale for scale, _ in expected]
    # It begins far too high, comes down by halves, and tries to rise after some good steps.
    assert scales[0] == 2.0**20
    assert min(scales) < 2.0**18
    assert any(b > a for a, b in itertools.pairwise(scales))
    assert all(b < a for (a, n), (b, _) in itertools.pairwise(expected) if n == torch.inf)

    run_ranks(before, HALF, config=config, steps=9)
    for found, state, _ in run_ranks(after, HALF, config=config, steps=5, resume=True):
        if before == after:
            assert (found, state) == (expected[9:], last)
        # At other numbers of ranks sums in float16 overflow at others of these scales.
        assert found[0][0] == scales[9] != 2.0**20
        assert state["cur_iter"] == last["cur_iter"] == 14


def test_a_gradient_that_overflows_at_every_scale_ends_the_run_with_what_to_do(tmp_path):
    half = {
        "fp16": {
            "enabled": True,
            "initial_scale_power": 24,
            "hysteresis": 1,
            "min_loss_scale": 2**23,
        }
    }
    config = make_config(tmp_path, deepspeed=half, train={"global_batch": 4, "micro_batch": 2})
    for text in run_ranks(2, "tests.train.runs:half_precision_in_vain", config=config):
        assert "overflows float16 at the smallest loss scale, " in text
        assert "min_loss_scale=8.38861e+06: lower train.lr" in text
