"""Survives: a rank killed at any point of a step or a save, SIGTERM at any time, a restart a step.

What is long runs in parts: `make test-long AREA=train`.
"""

from __future__ import annotations

import random
import re
import shutil
import sys
import time
from pathlib import Path
from signal import SIGTERM

import pytest

from megadistill.train import checkpoint
from tests.train.survive import POINTS, STOP_S, Death, die, finish, make_run, newest_step, start
from tests.train.survive import result as result_of

SEEDS, TERMS, TERM_PARTS = 3, 20, 4
ALWAYS = list(POINTS)[:10]  # those inside a step or a save


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("survive"))


@pytest.fixture(scope="module")
def undisturbed(file):
    out = file.parent / "undisturbed"
    finish(file, out, file.parent / "notes")
    return result_of(out)


def death_of(point: str, seed: int) -> Death:
    """Which rank dies and when: decided by the seed, at a time that every run comes to."""
    rng = random.Random(f"{point} {seed}")
    rank = 0 if "rank 0" in POINTS[point] else rng.randrange(2)
    inside_a_save = ALWAYS.index(point) >= 5
    return Death(point, rank, rng.randint(1, 4 if inside_a_save else 8))


def survive(file, undisturbed, folder: Path, death: Death) -> str:
    """A death, a rerun, and what came of it, in a line."""
    out = folder / "out"
    left_s = die(file, out, folder / "dying", death)
    step = newest_step(out) if out.exists() else 0
    said = finish(file, out, folder / "again")
    resumed = [int(found) for found in re.findall(r"resumed at step (\d+) of", said)]
    assert resumed == ([step] if step else []), said  # rank 0 says it, for all
    assert result_of(out) == undisturbed, death
    kept = [number for number, _ in checkpoint.checkpoints(out / "checkpoints")]
    assert sorted(kept) == [6, 8], death
    return f"{death}: left in {left_s:.1f} s, went on from step {step}"


@pytest.mark.parametrize(
    "point", ["after the backward", pytest.param("while DeepSpeed writes", marks=pytest.mark.long)]
)
def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_save(
    file, undisturbed, tmp_path, point
):
    survive(file, undisturbed, tmp_path, death_of(point, 0))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("part", range(2))
def test_a_rank_killed_at_any_point_of_a_step_or_a_save(
    file, undisturbed, tmp_path, capsys, seed, part
):
    for number, point in enumerate(ALWAYS[part::2]):
        line = survive(file, undisturbed, tmp_path / str(number), death_of(point, seed))
        with capsys.disabled():
            sys.stdout.write(f"\nseed {seed}: {line}")


@pytest.mark.long
def test_a_kill_while_converting_costs_nothing(file, tmp_path):
    """One rank's checkpoint, two ranks of which one dies converting it; again; and one rank again.

    The second run ends as a conversion does that nobody disturbed.
    """
    whole = tmp_path / "whole"
    finish(file, whole, tmp_path / "notes", world=1)
    shutil.rmtree(whole / "model")
    shutil.rmtree(whole / "checkpoints/step-000008")
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    finish(file, whole, tmp_path / "undisturbed")
    die(file, killed, tmp_path / "dying", Death("while converting", 0, 5))
    assert (killed / "checkpoints/.universal").is_dir()
    said = finish(file, killed, tmp_path / "again")
    assert "step-000006: written by 1 rank(s), 2 here: converting" in said
    assert "resumed at step 6 of 8" in said
    assert result_of(killed) == result_of(whole)
    assert not (killed / "checkpoints/.universal").exists()


def test_ranks_told_to_stop_one_in_the_last_save_and_one_at_the_export_part_in_peace(
    file, undisturbed, tmp_path
):
    first = Death("before the manifest", 1, 4, by=SIGTERM)
    second = Death("before the export", 0, 1, by=SIGTERM)
    with start(file, tmp_path / "out", tmp_path / "notes", first, second) as ranks:
        codes = ranks.wait(STOP_S + 60)
        assert codes == [0, 0], ranks.said()
        assert "Traceback" not in ranks.said()
    assert result_of(tmp_path / "out") == undisturbed


def told(file, undisturbed, folder: Path, delay: float) -> str:
    """A run told to stop after so many seconds: saved, gone in time, and gone on with."""
    out = folder / "out"
    with start(file, out, folder / "told") as ranks:
        ranks.wait(delay)
        began = time.monotonic()
        for process in ranks.processes:
            process.terminate()
        codes = ranks.wait(STOP_S)
        left_s = time.monotonic() - began
        assert None not in codes, f"after {delay:.2f} s\n{ranks.said()}"
        said = ranks.said()
    assert "Traceback" not in said, said
    saved = re.findall(r"stopped at step (\d+) of \d+: saved", said)
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().count("\n") if metrics.exists() else 0
    if saved:
        assert newest_step(out) == int(saved[0]) == lines, said
    elif (out / "model").exists():
        assert lines == 8
    else:
        assert newest_step(out) in (0, 8), said  # not yet training, or already exporting
    finish(file, out, folder / "again")
    assert result_of(out) == undisturbed
    return f"SIGTERM after {delay:.2f} s: left in {left_s:.1f} s, {saved or ['no']} saved"


def test_told_to_stop_a_run_saves_and_leaves(file, undisturbed, tmp_path):
    told(file, undisturbed, tmp_path, 4.0)


@pytest.mark.long
@pytest.mark.parametrize("part", range(TERM_PARTS))
def test_told_to_stop_at_random_times(file, undisturbed, tmp_path, capsys, part):
    began = time.monotonic()
    finish(file, tmp_path / "whole", tmp_path / "notes")
    length, rng = time.monotonic() - began, random.Random(part)
    for number in range(TERMS // TERM_PARTS):
        line = told(file, undisturbed, tmp_path / str(number), rng.uniform(0, length))
        with capsys.disabled():
            sys.stdout.write(f"\nof {length:.1f} s, {line}")


@pytest.fixture(scope="module")
def stepwise(tmp_path_factory):
    """A run of twenty steps with a checkpoint of each, and what came of it."""
    file = make_run(tmp_path_factory.mktemp("stepwise"), steps=20, save_every=1, keep=20)
    out = file.parent / "undisturbed"
    finish(file, out, file.parent / "notes")
    return file, result_of(out)


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_stopped_after_any_of_twenty_steps_it_ends_the_same_to_the_bit(stepwise, tmp_path, part):
    file, expected = stepwise
    for step in range(1 + part, 21, 4):
        out = tmp_path / f"out-{step}"
        shutil.copytree(file.parent / "undisturbed", out)
        shutil.rmtree(out / "model")
        for later, path in checkpoint.checkpoints(out / "checkpoints"):
            if later > step:
                shutil.rmtree(path)
        finish(file, out, tmp_path / f"notes-{step}")
        assert result_of(out) == expected, step


@pytest.mark.long
def test_one_run_killed_after_each_of_twenty_steps_ends_the_same_to_the_bit(stepwise, tmp_path):
    file, expected = stepwise
    out = tmp_path / "out"
    for step in range(1, 20):
        die(file, out, tmp_path / f"notes-{step}", Death("before the batch", step % 2, 2))
        assert newest_step(out) == step
    finish(file, out, tmp_path / "notes")
    assert result_of(out) == expected
