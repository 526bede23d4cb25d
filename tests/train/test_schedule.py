"""The learning rate by step."""

import pytest

from megadistill.config import TrainConfig
from megadistill.train.schedule import learning_rate


def rates(steps, **settings):
    config = TrainConfig(lr=1.0, min_lr_ratio=0.1, **settings)
    return [learning_rate(step, steps, config) for step in range(steps)]


def test_warm_up_rises_evenly_from_above_zero_to_the_peak():
    assert rates(8, warmup_steps=3, schedule="constant") == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    )


def test_cosine_goes_from_the_peak_to_the_last_rate():
    found = rates(11, schedule="cosine")
    assert (found[0], found[5], found[10]) == pytest.approx((1.0, 0.55, 0.1))
    assert found == sorted(found, reverse=True)


def test_wsd_is_stable_and_then_falls_to_the_last_rate():
    assert rates(10, schedule="wsd", decay_steps=3) == pytest.approx([1] * 7 + [0.7, 0.4, 0.1])
    assert rates(10, schedule="wsd")[:8] == [1] * 8  # a fifth of the steps decays


def test_one_step_is_a_run_too():
    for schedule in ("constant", "cosine"):
        assert rates(1, schedule=schedule) == [1.0]
