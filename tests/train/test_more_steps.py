"""Growing runs: only where no step that is done would have been another one."""

import pytest

from megadistill.train.more_steps import reason_against_growth
from tests.train.stores import make_config


@pytest.mark.parametrize(("done", "grows"), [(15, True), (16, True), (17, False), (20, False)])
def test_a_run_with_wsd_grows_until_its_decay_has_begun(tmp_path, done, grows):
    config = make_config(tmp_path, train={"schedule": "wsd", "decay_steps": 4, "steps": 40})
    reason = reason_against_growth(config, [], old=20, new=40, done=done)
    assert (reason is None) == grows
    if not grows:
        assert "the decay of train.schedule=wsd began after step 16" in reason


def test_a_run_becomes_longer_and_not_shorter(tmp_path):
    config = make_config(tmp_path, train={"schedule": "constant", "steps": 10})
    assert reason_against_growth(config, [], old=20, new=10, done=5) is not None
    assert reason_against_growth(config, [], old=10, new=20, done=5) is None


def test_a_cosine_and_a_curriculum_depend_on_the_length(tmp_path):
    config = make_config(tmp_path, train={"schedule": "cosine", "steps": 20})
    assert "cosine" in reason_against_growth(config, [], old=10, new=20, done=5)
    loss = {"ce_weight": [[0, 1], [1, 0]]}
    config = make_config(tmp_path, train={"schedule": "constant", "steps": 20}, loss=loss)
    assert "loss.ce_weight" in reason_against_growth(config, [], old=10, new=20, done=5)
