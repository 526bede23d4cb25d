"""One training at a time in a folder, settings that may change there, and what is said of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from megadistill.errors import ConfigError, LockedError, RecipeError, TrainError
from megadistill.preflight.folder_checks import check_run_folder
from megadistill.storage.lock import RUN_LOCK, StoreLock, _identity
from megadistill.storage.records import read_json
from megadistill.train import checkpoint
from megadistill.train.run_folder import RunFolder
from tests.ranks import run_ranks
from tests.train.stores import make_config
from tests.train.test_loop import elsewhere, metrics, series, weights

RUN, CLAIMED, MESSAGE = (f"tests.train.runs:{n}" for n in ("run", "claimed", "message"))
CONSTANT = {"schedule": "constant", "save_every": 2, "keep": 9, "steps": 4}


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "megadistill")
    return caplog


def saved(config):
    found = checkpoint.checkpoints(Path(config.train.out_dir) / "checkpoints")
    return sorted(step for step, _ in found)


def claim(config, **train):
    """Rank 0's part of a start in the folder of `config`, on identities made by hand."""
    config = elsewhere(config, "out", **train)
    identity = {
        "loss": config.loss.model_dump(mode="json"),
        "train": {"lr": config.train.lr, "steps": config.train.steps},
    }
    with ExitStack() as held:
        return RunFolder(config.train.out_dir).claim(identity, config, held)


def test_a_second_training_is_refused_while_the_first_lives_and_changes_nothing(tmp_path):
    config = make_config(tmp_path)
    out = Path(config.train.out_dir)
    out.mkdir()
    with StoreLock(out / RUN_LOCK, what="a run", patience_s=60):
        before = sorted(p.name for p in out.iterdir())
        for kind, text in run_ranks(2, MESSAGE, config=config):  # the same error on all ranks
            assert kind == "LockedError"
            who = f"process {os.getpid()} on {socket.gethostname()} since 20"
            assert f"train.out_dir: {out}: is being written by {who}" in text
        assert sorted(p.name for p in out.iterdir()) == before


def test_the_lock_of_a_dead_training_is_taken_over_and_released_at_the_end(tmp_path):
    config = make_config(tmp_path)
    out = Path(config.train.out_dir)
    out.mkdir()
    dead = _identity() | {"nonce": "old", "started": "1", "since": "2026-01-01 00:00:00 UTC"}
    (out / RUN_LOCK).write_text(json.dumps(dead))
    assert run_ranks(2, RUN, config=config) == [4, 4]
    assert not [p for p in out.iterdir() if p.name.startswith(RUN_LOCK)]


def test_a_training_whose_lock_is_taken_stops_on_all_ranks_before_it_writes(tmp_path):
    config = make_config(tmp_path, train={"steps": 8, "save_every": 2})
    results = run_ranks(2, "tests.train.runs:run_and_lose_the_lock", config=config, lines=3)
    for kind, text in results:
        assert kind == "LockedError"
        assert "process 7 on far" in text
        assert "has taken it over" in text
    assert [line["step"] for line in metrics(config)] == [1, 2, 3]
    assert saved(config) == [2]
    assert json.loads((tmp_path / "out" / RUN_LOCK).read_text())["nonce"] == "new"  # left alone


def test_a_folder_without_a_checkpoint_takes_another_lr_and_says_so(tmp_path, said):
    config = make_config(tmp_path)
    claim(config, lr=0.5)
    (tmp_path / "out/trackers.json").write_text("of the other run")
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    found = claim(config, lr=0.25)
    assert (found.finished, found.found) == (False, None)
    assert read_json(tmp_path / "out/run.json")["train"]["lr"] == 0.25
    assert not (tmp_path / "out/trackers.json").exists()
    first, second = said.messages
    assert "left no checkpoint, and the 2 step(s) it did are lost: this one begins at st" in first
    assert "other settings than before: train.lr 0.5 -> 0.25" in second


def test_begun_anew_a_run_ends_as_one_in_an_empty_folder(tmp_path):
    config = make_config(tmp_path)
    run_ranks(1, CLAIMED, config=elsewhere(config, "out", lr=0.5))
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    whole = elsewhere(config, "whole")
    for each in (config, whole):
        assert run_ranks(1, RUN, config=each) == [4]
    assert series(config) == series(whole)


def test_the_same_command_in_a_folder_that_lost_everything_says_that_it_begins_at_step_1(
    tmp_path, said
):
    config = make_config(tmp_path)
    claim(config)
    assert said.messages == []
    claim(config)
    (line,) = said.messages
    assert line.endswith(
        "the run that was begun here left no checkpoint: this one begins at step 1"
    )


def test_one_checkpoint_fixes_the_settings(tmp_path):
    config = make_config(tmp_path, train=CONSTANT)
    run_ranks(1, RUN, config=config)
    shutil.rmtree(tmp_path / "out/model")
    before = (tmp_path / "out/run.json").read_bytes()
    other = elsewhere(config, "out", lr=0.5)
    ((kind, text),) = run_ranks(1, MESSAGE, config=other)
    assert (kind, "train.lr is 0.01, this run's is 0.5" in text) == ("RecipeError", True)
    assert (tmp_path / "out/run.json").read_bytes() == before


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(
            {"schedule": "wsd", "decay_steps": 2}, marks=[pytest.mark.long, pytest.mark.runs]
        ),
    ],
    ids=["constant", "wsd"],
)
def test_a_run_that_grows_is_to_the_bit_the_longer_run(tmp_path, settings):
    """Finished with a constant rate; or stopped before the decay of `wsd` began."""
    config = make_config(tmp_path, train=CONSTANT | {"ema": True, "use_ema": True} | settings)
    whole = elsewhere(config, "whole", steps=6)
    for each in (config, whole):
        run_ranks(2, RUN, config=each)
    if settings:
        shutil.rmtree(tmp_path / "out/model")
        shutil.rmtree(tmp_path / "out/checkpoints/step-000004")
    assert run_ranks(2, RUN, config=elsewhere(config, "out", steps=6)) == [6, 6]
    assert series(config) == series(whole)
    for name, value in weights(whole).items():
        assert torch.equal(weights(config)[name], value)
    kept = (tmp_path / "out/model_step_000004").exists()
    assert kept == (not settings)
    assert run_ranks(2, RUN, config=elsewhere(config, "out", steps=6)) == [6, 6]  # finished


@pytest.mark.parametrize(
    ("train", "loss", "new", "reason"),
    [
        ({"schedule": "cosine"}, {}, 8, "with train.schedule=cosine the learning rate of every"),
        ({"schedule": "wsd"}, {}, 8, "the decay of train.schedule=wsd began after step 3, and"),
        ({}, {"kd_weight": ((0, 1.0), (1, 0.5))}, 8, "loss.kd_weight is given by points"),
        ({}, {"label_smoothing": ((0, 0), (1, 0.1))}, 8, "loss.label_smoothing is given by points"),
        ({}, {"curriculum": "three_phase"}, 8, "loss.curriculum=three_phase has its phases at"),
        ({}, {}, 3, "a run may become longer, not shorter"),
    ],
)
def test_a_run_does_not_grow_where_a_step_that_is_done_depends_on_the_length(
    tmp_path, monkeypatch, train, loss, new, reason
):
    config = make_config(tmp_path, train=CONSTANT | train, loss=loss)
    claim(config)
    found = checkpoint.Checkpoint(tmp_path, checkpoint.Position(4, 0, 0), 1, None)
    monkeypatch.setattr(checkpoint, "latest", lambda folder: found)
    with pytest.raises(RecipeError) as refused:
        claim(config, steps=new)
    text = str(refused.value)
    assert f"train.steps is 4, this run's is {new}: {reason}" in text
    assert text.endswith("set train.steps=4, or choose another train.out_dir")
    assert read_json(tmp_path / "out/run.json")["train"]["steps"] == 4
    assert claim(config).found is found


def test_before_its_decay_a_run_may_grow(tmp_path, monkeypatch, said):
    config = make_config(tmp_path, train=CONSTANT | {"schedule": "wsd", "decay_steps": 2})
    claim(config)
    found = checkpoint.Checkpoint(tmp_path, checkpoint.Position(2, 0, 0), 1, None)
    monkeypatch.setattr(checkpoint, "latest", lambda folder: found)
    assert claim(config, steps=9).found is found
    assert said.messages[-1].endswith("train.steps grows from 4 to 9")


def test_a_lock_that_a_killed_start_left_alone_is_no_other_content(tmp_path):
    config = make_config(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / RUN_LOCK).write_text(json.dumps(_identity() | {"nonce": "old", "started": "1"}))
    (out / f"{RUN_LOCK}.0123").write_text("{}")
    check_run_folder(config.train.out_dir)
    assert not claim(config).finished


def test_a_link_to_nothing_is_said_before_anything_is_loaded(tmp_path):
    config = make_config(tmp_path)
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    said = r"^train.out_dir: .*/out is a link to .*/gone, which does not exist: make that folder"
    with pytest.raises(ConfigError, match=said):
        check_run_folder(config.train.out_dir)


def test_a_run_through_a_link_is_the_run_in_the_folder(tmp_path):
    config = make_config(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    check_run_folder(config.train.out_dir)
    claim(config)
    assert (tmp_path / "real/run.json").exists()
    with (
        StoreLock(tmp_path / "real" / RUN_LOCK, what="a run", patience_s=60),
        pytest.raises(LockedError),
    ):
        claim(config)


@pytest.mark.parametrize("left", [0, -9])
def test_a_damaged_run_json_is_said_of_the_run_and_not_of_a_cache(tmp_path, left):
    config = make_config(tmp_path)
    claim(config)
    file = tmp_path / "out/run.json"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(TrainError) as refused:
        claim(config)
    text = str(refused.value)
    assert "run.json: is damaged, so the run cannot be identified" in text
    assert text.endswith("restore it from a copy, or choose another train.out_dir")
    assert "CACHE" not in text


def test_an_empty_model_folder_is_no_finished_run(tmp_path):
    config = make_config(tmp_path)
    assert run_ranks(1, RUN, config=config) == [4]
    shutil.rmtree(tmp_path / "out/model")
    (tmp_path / "out/model").mkdir()
    assert run_ranks(1, RUN, config=config) == [4]
    assert (tmp_path / "out/model/config.json").exists()


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many KiB at tmp_path/out."""
    out = tmp_path / "out"
    out.mkdir()

    def mount(kib):
        options = ["-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(out)]
        if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a tmpfs")

    yield mount
    subprocess.run(["umount", "--lazy", str(out)], capture_output=True, check=False)


@pytest.mark.parametrize(
    ("kib", "settings"),
    [(8, {}), (100, {}), (100, {"save_in_background": True}), (420, {})],
    ids=["run.json and metrics", "a checkpoint", "in the background", "the model"],
)
def test_a_full_disk_is_one_line_and_the_run_resumes_when_there_is_room(
    tmp_path, small_disk, kib, settings
):
    config = make_config(tmp_path, train={"save_every": 2, "keep": 1} | settings)
    small_disk(kib)
    ((kind, text),) = run_ranks(1, MESSAGE, config=config)
    assert kind in ("TrainError", "StoreError"), text
    assert str(tmp_path / "out") in text
    assert "\n" not in text
    remount = ["mount", "-o", "remount,size=64m", str(tmp_path / "out")]
    subprocess.run(remount, check=True)
    assert run_ranks(1, RUN, config=config) == [4]
    assert (tmp_path / "out/model/config.json").exists()


def test_minutes_between_checkpoints_change_nothing_but_when_they_are_written(tmp_path):
    config = make_config(tmp_path, train={"keep": 9})
    often = elsewhere(config, "often", save_minutes=1e-9)
    for each in (config, often):
        assert run_ranks(2, RUN, config=each) == [4, 4]
    assert (saved(config), saved(often)) == ([4], [1, 2, 3, 4])
    assert series(often) == series(config)
    for name, value in weights(config).items():
        assert torch.equal(weights(often)[name], value)


def test_a_lock_that_another_holds_is_an_error_before_anything_is_looked_at(tmp_path):
    config = make_config(tmp_path)
    claim(config)
    (tmp_path / "out/metrics.jsonl").write_text("not JSON\n")
    with (
        StoreLock(tmp_path / "out" / RUN_LOCK, what="a run", patience_s=60),
        pytest.raises(LockedError),
    ):
        claim(config, lr=0.5)
