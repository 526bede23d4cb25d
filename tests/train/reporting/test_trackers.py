"""What trackers show, read back with their own libraries, and what they cannot do to a run."""

import contextlib
import importlib.util
import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megadistill.errors import ConfigError
from megadistill.train.reporting.jsonl_log import read_records
from megadistill.train.reporting.trackers import check_trackers, run_name
from tests.programs import ROOT
from tests.ranks import run_ranks
from tests.train.reporting.tracked import make_config
from tests.train.stores import make_config as make_run_config
from tests.train.stores import make_store

HAVE_TRACKIO = importlib.util.find_spec("trackio") is not None


def tracked(folder, *, environment=None, **arguments):
    """The log of a process that reports; the 60 s are what an exit that hangs is found by."""
    command = [
        sys.executable,
        "-m",
        "tests.train.reporting.tracked",
        str(folder),
        json.dumps(arguments),
    ]
    place = folder.parent
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(place / "trackio"),
        **(environment or {}),
    }
    # Into a file: what a tracker leaves running would hold a pipe open.
    with open(place / "log.txt", "w") as log:
        child = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            code = child.wait(timeout=60)
        finally:
            child.kill()
            child.wait()
            end_services(child.pid)
    said = (place / "log.txt").read_text()
    assert code == 0, said
    return [line for line in said.splitlines() if "WARNING" in line or "Traceback" in line]


def end_services(pid):
    """What wandb started for the process, which a test may have stopped."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--pid" in words and words[words.index("--pid") + 1] == str(pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that was stopped at step 7, and went on from step 4 with losses that are 0.5 higher."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    names = ["tensorboard", "wandb", *(["trackio"] if HAVE_TRACKIO else [])]
    common = {"trackers": names, "project": "tests", "run_name": "a run"}
    assert tracked(folder, until=7, **common) == []
    assert tracked(folder, done=4, until=20, shift=0.5, **common) == []
    return folder


# What every process of the two reported: steps 1 to 7, then 5 to 20.
FIRST = {step: float(step) for step in range(1, 8)}
AGAIN = {step: step + 0.5 for step in range(5, 21)}


def test_the_journal_of_the_resumed_run_holds_what_was_done_last(resumed):
    found = {r["step"]: r["loss"] for r in read_records(resumed / "metrics.jsonl")}
    assert found == {step: float(step) for step in range(1, 5)} | AGAIN


def test_tensorboard_draws_steps_that_are_done_again_over_the_old_ones(resumed):
    figures = tensorboard_figures(resumed / "tensorboard")
    assert figures["train/loss"] == [*list(FIRST.items())[:4], *AGAIN.items()]
    assert figures["eval/loss"] == [(4, 40.0), (8, 80.5), (12, 120.5), (16, 160.5), (20, 200.5)]
    assert figures["eval/calibration_error"] == [(s, pytest.approx(0.1)) for s in range(4, 21, 4)]
    assert not {"train/step", "train/kd_loss"} & figures.keys()


def test_wandb_keeps_the_first_of_steps_that_are_done_again_in_one_run(resumed):
    runs, history = wandb_records(resumed / "wandb")
    assert len({run.run_id for run in runs}) == 1
    assert {(run.project, run.display_name) for run in runs} == {("tests", "a run")}
    kept = [(row["_step"], row["train/loss"]) for row in history]
    assert kept == [*FIRST.items(), *((step, AGAIN[step]) for step in range(8, 21))]
    evaluated = [(row["_step"], row["eval/loss"]) for row in history if "eval/loss" in row]
    assert evaluated == [(4, 40.0), (8, 80.5), (12, 120.5), (16, 160.5), (20, 200.5)]


@pytest.mark.skipif(not HAVE_TRACKIO, reason="trackio is not installed, and is in no lock")
def test_trackio_keeps_the_first_of_steps_that_are_done_again_in_one_run(resumed):
    with contextlib.closing(sqlite3.connect(resumed.parent / "trackio" / "tests.db")) as database:
        rows = database.execute(
            "select run_id, run_name, step, metrics from metrics order by id"
        ).fetchall()
    assert len({run for run, *_ in rows}) == 1
    assert {name for _, name, *_ in rows} == {"a run"}
    figures = [(step, json.loads(metrics)) for *_, step, metrics in rows]
    kept = [(step, metrics["train/loss"]) for step, metrics in figures if "train/loss" in metrics]
    assert kept == [*FIRST.items(), *((step, AGAIN[step]) for step in range(8, 21))]
    evaluated = [(step, m["eval/loss"]) for step, m in figures if "eval/loss" in m]
    assert evaluated == [(4, 40.0), (8, 80.5), (12, 120.5), (16, 160.5), (20, 200.5)]


NO_NETWORK = {
    "WANDB_MODE": "online",
    "WANDB_BASE_URL": "http://127.0.0.1:9",
    "WANDB_API_KEY": "a" * 40,
}


@pytest.mark.parametrize(
    ("tracker", "hurt", "environment", "said"),
    [
        ("wandb", "kill", {}, r"wandb failed at step \d+ \(\w+Error"),
        ("wandb", "stop", {}, "wandb is not done with what it was given"),
        pytest.param(
            "wandb",
            None,
            NO_NETWORK,
            "wandb (is not done|failed at step 1 )",
            marks=pytest.mark.long,
        ),
        ("wandb", None, {"WANDB_MODE": "online", "HOME": "/"}, "wandb failed at step 1 .*API key"),
        ("tensorboard", "full", {}, r"tensorboard failed at step \d+ \(OSError.*File too large"),
    ],
    ids=["its service dies", "its service hangs", "no network", "no login", "a full disk"],
)
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    tmp_path, tracker, hurt, environment, said
):
    folder = tmp_path / "run"
    lines = tracked(folder, environment=environment, trackers=[tracker], until=19, hurt=hurt)
    warnings = [line for line in lines if "WARNING" in line]
    assert len(warnings) == 1
    assert re.search(f"train.trackers: {said}.*: the run continues without it, and ", warnings[0])
    assert [r["step"] for r in read_records(folder / "metrics.jsonl")] == list(range(1, 20))
    assert [r["step"] for r in read_records(folder / "eval.jsonl")] == [4, 8, 12, 16]


def test_a_tracker_that_cannot_begin_is_begun_again_by_the_next_start(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tensorboard").touch()
    (warning,) = tracked(folder, trackers=["tensorboard"], until=7)
    assert "tensorboard failed at step 1 (FileExistsError" in warning
    (folder / "tensorboard").unlink()
    assert tracked(folder, trackers=["tensorboard"], done=4, until=8) == []
    found = tensorboard_figures(folder / "tensorboard")["train/loss"]
    assert [step for step, _ in found] == [5, 6, 7, 8]


@pytest.mark.long
def test_a_damaged_list_of_names_begins_a_new_curve(tmp_path):
    folder = tmp_path / "run"
    assert tracked(folder, trackers=["wandb"], until=2) == []
    (folder / "trackers.json").write_text('{"wandb": "half')
    assert tracked(folder, trackers=["wandb"], done=1, until=3) == []
    runs, history = wandb_records(folder / "wandb")
    assert len({run.run_id for run in runs}) == 2
    assert sorted(row["_step"] for row in history) == [1, 2, 2, 3]


def test_a_library_that_is_missing_or_broken_is_a_line_before_anything_is_loaded(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # for Python: there is no such package
    (tmp_path / "trackio").mkdir()
    (tmp_path / "trackio" / "__init__.py").write_text("raise ImportError('no pillow\\nat all')")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    config = make_config(tmp_path, trackers=["wandb", "trackio", "tensorboard"])
    with pytest.raises(ConfigError) as caught:
        check_trackers(config.train.trackers)
    missing = (
        "train.trackers: wandb needs the package wandb, which is not installed: pip install wandb, "
        "or leave wandb out of train.trackers"
    )
    assert str(caught.value) == missing
    with pytest.raises(ConfigError) as caught:
        check_trackers(config.train.trackers, load=True)
    assert str(caught.value).splitlines() == [
        missing,
        "train.trackers: the package trackio cannot be imported (ImportError: no pillow): "
        "pip install trackio, or leave trackio out of train.trackers",
    ]


@pytest.mark.parametrize(
    ("out_dir", "name"), [("runs/zero3/train", "zero3/train"), ("out", "out"), ("/a", "//a")]
)
def test_a_run_is_called_by_its_folder_unless_it_has_a_name(out_dir, name):
    assert run_name(make_config(out_dir)) == name
    assert run_name(make_config(out_dir, run_name="mine")) == "mine"


def test_training_shows_rank_0s_figures_and_a_resumed_run_may_have_other_trackers(tmp_path):
    make_store(tmp_path / "heldout", method="topk", sequences=4, seed=5)
    common = {"eval_every": 2, "save_every": 2}
    config = make_run_config(
        tmp_path, eval={"cache": str(tmp_path / "heldout")}, train={**common, "trackers": []}
    )
    run_ranks(2, "tests.train.runs:run_until_told", config=config, lines=1)
    done = len(read_records(tmp_path / "out" / "metrics.jsonl"))
    config = make_run_config(
        tmp_path,
        eval={"cache": str(tmp_path / "heldout")},
        train={**common, "trackers": ["tensorboard"]},
    )
    assert run_ranks(2, "tests.train.runs:run", config=config) == [4, 4]
    figures = tensorboard_figures(tmp_path / "out" / "tensorboard")
    for kind, file in (("train", "metrics.jsonl"), ("eval", "eval.jsonl")):
        records = read_records(tmp_path / "out" / file)
        later = sum(r["step"] > done for r in records)
        for key in records[-1].keys() - {"step"}:
            found = figures[f"{kind}/{key}"]
            # An evaluation that the stop came before is left to the resumed run.
            assert len(found) in (later, later + (kind == "eval"))
            expected = [(r["step"], pytest.approx(r[key], rel=1e-6)) for r in records]
            assert found == expected[-len(found) :]
    imported = run_ranks(2, "tests.train.runs:has_imported", name="tensorboard")
    assert imported == [True, False]


def tensorboard_figures(folder):
    """Name -> [(step, value)], as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def wandb_records(folder):
    """The runs, and the rows of their history, of what wandb keeps to be synchronised.

    A log of records as LevelDB writes it (blocks of 32 KiB, a header of 7 bytes a piece), each a
    protocol buffer of wandb's own.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    runs, history = [], []
    for file in sorted(Path(folder).glob("offline-run-*/*.wandb"), key=os.path.getmtime):
        data, at, piece = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            piece += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind not in (1, 4):  # whole, or last
                continue
            record, piece = Record.FromString(piece), b""
            if record.WhichOneof("record_type") == "run":
                runs.append(record.run)
            elif record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: item for item in record.history.item}
                history.append({key: json.loads(item.value_json) for key, item in row.items()})
    return runs, history
