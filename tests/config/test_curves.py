"""Values that change over a run."""

from __future__ import annotations

import pytest

from megadistill.config.curves import value_at
from megadistill.config.load import validate
from tests.config.test_rules import changed


@pytest.mark.parametrize(
    ("done", "expected"),
    [(0, 1), (0.1, 1), (0.3, 2), (0.499, 2.995), (0.5, 7), (0.75, 6), (0.9, 5), (1, 5)],
)
def test_between_two_points_it_runs_straight_and_two_at_one_place_are_a_jump(done, expected):
    curve = ((0.1, 1.0), (0.5, 3.0), (0.5, 7.0), (0.8, 5.8), (0.9, 5.0))
    assert value_at(curve, done) == pytest.approx(expected)
    assert value_at(0.25, done) == 0.25


def test_the_loss_at_a_time_has_numbers():
    config, found = validate(
        changed("loss.kd_weight=[[0, 1], [1, 0]]", "loss.ce_weight=[[0.2, 0], [0.6, 4]]")
    )
    assert found == []
    loss = config.loss.at(0.4)
    assert (loss.kd_weight, loss.ce_weight) == pytest.approx((0.6, 2))
    assert config.loss.changes == ("kd_weight", "ce_weight")
    assert config.loss.learns_from_teacher
    assert loss.changes == ()


def test_three_phases_of_a_cache_are_two():
    config, found = validate(changed("loss.curriculum=three_phase", "loss.ce_weight=0.3"))
    assert found == []
    weights = [config.loss.at(done / 10).ce_weight for done in range(10)]
    assert weights == [0] * 6 + [0.3] * 4
    assert config.loss.changes == ("ce_weight",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["loss.kd_weight=[[0, 1]]"], "loss.kd_weight: expected at least two points"),
        (["loss.kd_weight=[[1, 1], [0, 1]]"], "by rising fraction, found [[1, 1], [0, 1]]"),
        (["loss.kd_weight=[[0, -1], [1, 1]]"], "loss.kd_weight.0.1: expected a number of at least"),
        (["loss.kd_weight=[[0, 1], [2, 1]]"], "loss.kd_weight.1.0: expected a number of at most 1"),
        (["loss.kd_weight=[0, 1]"], "loss.kd_weight.0: expected a list of two numbers, found 0"),
        (["loss.label_smoothing=[[0, 0], [1, 1]]"], "expected a number below 1, found 1"),
        (["loss.kd_weight=[[0.2, 0], [0.5, 1]]"], "are both 0 at 0 of the run"),
        (["loss.kd_weight=[[0, 1], [0.5, 0], [0.7, 1]]"], "are both 0 at 0.5 of the run"),
        (
            ["teacher.mode=online", "loss.temperature=[[0, 1], [1, 2]]"],
            "loss.temperature: 2.0 differs from the targets'",
        ),
        (["loss.curriculum=three_phase"], "loss.curriculum: three_phase with loss.ce_weight=0.0"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    _, found = validate(changed(*settings))
    assert any(said in str(problem) for problem in found), found
