"""A run's reports without a run, in a process of its own: what trackers make of them.

python -m tests.train.tracked FOLDER '{"trackers": ["wandb"], "done": 0, "until": 7}'
"""

import json
import os
import sys
from pathlib import Path

from megadistill.commands import start_logging
from megadistill.config import Config
from megadistill.train.metrics import Reporter
from megadistill.train.trackers import check_trackers


def make_config(folder, **train):
    return Config(
        data={"source": "python-stdlib"},
        teacher={"model": "a/teacher"},
        student={"model": "a/student"},
        train={"out_dir": str(folder), "steps": 20, **train},
    )


def record(step, loss):
    return {
        "step": step, "loss": loss, "kd_loss": None, "ce_loss": loss, "grad_norm": 1.0, "lr": 1e-3,
        "sequences": 8 * step, "tokens": 128 * step, "tokens_per_s": 1e3, "data_s": 0.0,
        "step_s": 0.1,
    }  # fmt: skip


def held_out(step, loss):
    return {
        "step": step, "loss": loss, "perplexity": 9.0, "kl": 0.5, "top1_agreement": 0.5,
        "calibration_error": 0.1, "positions": 100, "sequences": 10,
    }  # fmt: skip


def report(reporter, steps, *, shift=0.0):
    """A line a step, an evaluation every fourth; `shift` tells one process's losses by."""
    for step in steps:
        reporter.step(record(step, step + shift))
        if step % 4 == 0:
            reporter.evaluation(held_out(step, 10 * step + shift))


def main(folder, *, trackers, done=0, until, shift=0.0, killed=False, **train):
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    config = make_config(folder, trackers=trackers, **train)
    check_trackers(config, load=True)
    reporter = Reporter(folder, config, done=done, steps=20)
    with reporter:
        report(reporter, range(done + 1, until + 1), shift=shift)
        if killed:
            os._exit(9)


if __name__ == "__main__":
    start_logging()
    main(sys.argv[1], **json.loads(sys.argv[2]))
