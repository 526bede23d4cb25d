"""Kills over training: at named points inside a step and inside a save, and what must follow.

Ranks are forked from a warm server on the same entry point as `deepspeed launch/train.py`. One of
two kills itself, with the signal nobody can handle, on reaching a point for the n-th time; the
other must leave; the run is started again and must end as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.forked import Ranks
from tests.programs import program
from tests.train.stores import make_config

ROOT = Path(__file__).resolve().parent.parent.parent
CHECKPOINT = "megadistill.train.checkpoint"
STOP_S = 20  # all ranks leave within so long of one's death
RUN_S = 200  # a run that takes longer hangs

# Where to die: a function and whether before or after it. `rank 0`: nobody else comes by.
POINTS = {
    "before the batch": ("megadistill.train.batches:Batches.__next__", "before"),
    "before the forward": ("megadistill.train.student_engine:Trainer.backward", "before"),
    "after the backward": ("megadistill.train.student_engine:Trainer.backward", "after"),
    "before the update": ("megadistill.train.student_engine:Trainer.step", "before"),
    "inside the update": ("torch.optim:AdamW.step", "after"),
    "before the save": ("megadistill.train.checkpoint:save", "before"),
    "while DeepSpeed writes": ("torch:save", "after"),
    "before the manifest": ("megadistill.train.checkpoint:_random_states", "after"),
    "inside the manifest": ("megadistill.train.checkpoint:_entry", "before", "rank 0"),
    "before the old are removed": (
        "megadistill.train.checkpoint:_remove_all_but",
        "before",
        "rank 0",
    ),
    "before the export": ("megadistill.train.run:_export", "before"),
    "while converting": (
        "deepspeed.checkpoint.ds_to_universal:merge_zero3_slices",
        "before",
        "rank 0",
    ),
    "before the background has written": (f"{CHECKPOINT}.background:_written", "before"),
    "when the background has written": (f"{CHECKPOINT}.background:_written", "after"),
}


@dataclass(frozen=True)
class Death:
    """Rank `rank` sends itself the signal `by` when it comes by `point` for the n-th time."""

    point: str
    rank: int
    time: int
    by: int = signal.SIGKILL


def make_run(folder: Path, **train: object) -> Path:
    """The file of a configuration of a small run: a checkpoint every second step."""
    config = make_config(
        folder,
        train={"steps": 8, "save_every": 2, "keep": 2, "ema": True, "use_ema": True, **train},
    )
    # It fits: 24 GiB of free disk are no part of what is tested.
    file = folder / "config.json"
    settings = config.model_dump(mode="json")
    settings["cache"]["min_free"] = 0
    file.write_text(json.dumps(settings))
    return file


def start(file: Path, out: Path, notes: Path, *deaths: Death, world: int = 2) -> Ranks:
    argv = ["--config", str(file), f"train.out_dir={out}"]
    return Ranks(world, "tests.train.survive:train", argv, deaths, folder=notes)


def train(argv: list[str], deaths: tuple[Death, ...]) -> int:
    """What a forked rank runs: launch/train.py, to its end or its death."""
    from megadistill.cli.command_line import run

    for death in deaths:
        if int(os.environ["RANK"]) == death.rank:
            arm(death)
    return run(program("launch/train.py").main, argv)


def arm(death: Death) -> None:
    """Have this process killed at its point."""
    where, when, *_ = POINTS[death.point]
    module, _, path = where.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function, left = getattr(owner, name), [death.time]

    def deadly(*args: object, **kwargs: object) -> object:
        left[0] -= 1
        if left[0] == 0 and when == "before":
            os.kill(os.getpid(), death.by)
        result = function(*args, **kwargs)
        if left[0] == 0 and when == "after":
            os.kill(os.getpid(), death.by)
        return result

    setattr(owner, name, deadly)


def finish(file: Path, out: Path, notes: Path, world: int = 2) -> str:
    """A run that nobody disturbs; what its ranks said."""
    with start(file, out, notes, world=world) as ranks:
        codes = ranks.wait(RUN_S)
        assert codes == [0] * world, f"{codes}\n{ranks.said()}"
        return ranks.said()


def die(file: Path, out: Path, notes: Path, death: Death) -> float:
    """A run in which `death` comes; seconds until the survivor had left."""
    with start(file, out, notes, death) as ranks:
        ranks.processes[death.rank].join(RUN_S)
        assert ranks.codes[death.rank] == -signal.SIGKILL, f"{death}\n{ranks.said()}"
        began = time.monotonic()
        codes = ranks.wait(STOP_S)
        assert codes[1 - death.rank] not in (None, 0), f"{death}: {codes}\n{ranks.said()}"
        assert "Traceback" not in ranks.said(), f"{death}\n{ranks.said()}"
        return time.monotonic() - began


def result(out: Path) -> tuple[list[list[float]], dict[str, str]]:
    """Every step's numbers, and the hash of every file of the exported model."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = [
        [line[k] for k in ("step", "loss", "kd_loss", "grad_norm", "lr", "sequences")]
        for line in lines
    ]
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((out / "model").iterdir())
        if path.name != "README.md"  # it names its folder
    }
    return numbers, hashes


def newest_step(out: Path) -> int:
    """The step of the newest sound checkpoint; 0 without one."""
    from megadistill.errors import TrainError
    from megadistill.train import checkpoint

    with contextlib.suppress(TrainError):
        found = checkpoint.latest(out / "checkpoints")
        return found.position.step if found else 0
    return 0
