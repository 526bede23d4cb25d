"""Ctrl-C and SIGTERM at random times, under python and deepspeed, lose at most the current step."""

from __future__ import annotations

import random
import signal
import sys

import pytest

from tests.train.interrupt import interrupt, lines, run_to_the_end
from tests.train.survive import make_run, result

pytestmark = [pytest.mark.launcher, pytest.mark.long, pytest.mark.runs]
PARTS, TIMES = 4, 5  # 20 of each kind
STEPS = 60


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("interrupt"), steps=STEPS, save_every=None)


@pytest.fixture(scope="module", params=["python", "deepspeed"])
def undisturbed(request, file):
    """How runs are started, what came of one that nobody interrupts, and its seconds."""
    how, out = request.param, file.parent / f"undisturbed-{request.param}"
    whole_s = run_to_the_end(how, file, out, file.parent / f"{how}.log")
    return how, result(out), whole_s


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_interrupted_at_random_times_it_ends_the_same_to_the_bit(
    file, undisturbed, tmp_path, capsys, number, part
):
    how, expected, whole_s = undisturbed
    rng, folder = random.Random(f"{how} {number} {part}"), 0
    for time in range(TIMES):
        out = tmp_path / f"out-{folder}"
        line = interrupt(how, number, file, out, tmp_path / f"{time}.log", rng, whole_s)
        with capsys.disabled():
            sys.stdout.write(f"\n{line}")
        if (out / "model").exists():  # it was done before
            assert result(out) == expected
            folder += 1
    out = tmp_path / f"out-{folder}"
    run_to_the_end(how, file, out, tmp_path / "end.log")
    assert lines(out) == STEPS
    assert result(out) == expected
