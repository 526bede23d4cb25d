"""A run's reports without a run, in a process of its own: what trackers make of them.

python -m tests.train.reporting.tracked FOLDER '{"trackers": ["wandb"], "done": 0, "until": 7}'
"""

import json
import resource
import signal
import sys
import time
from pathlib import Path

import psutil

from megadistill.cli.command_line import start_logging
from megadistill.config import Config
from megadistill.train.reporting.metrics import Reporter
from megadistill.train.reporting.trackers import check_trackers


def make_config(folder, **train):
    return Config(
        data={"source": "python-stdlib"},
        teacher={"model": "a/teacher"},
        student={"model": "a/student"},
        train={"out_dir": str(folder), "steps": 20, **train},
    )


def record(step, loss):
    return {
        "step": step,
        "loss": loss,
        "kd_loss": None,
        "ce_loss": loss,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "sequences": 8 * step,
        "tokens": 128 * step,
        "tokens_per_s": 1e3,
        "data_s": 0.0,
        "step_s": 0.1,
        "memory_used": 1 << 30,
        "memory_total": 8 << 30,
        "flops": 1e12,
    }


def held_out(step, loss):
    return {
        "step": step,
        "loss": loss,
        "perplexity": 9.0,
        "kl": 0.5,
        "top1_agreement": 0.5,
        "calibration_error": 0.1,
        "positions": 100,
        "sequences": 10,
    }


def report(reporter, steps, *, shift=0.0):
    """A line a step, an evaluation every fourth; `shift` tells one process's losses by."""
    for step in steps:
        reporter.step(record(step, step + shift))
        if step % 4 == 0:
            reporter.evaluation(held_out(step, 10 * step + shift))


def main(folder, *, trackers, done=0, until, shift=0.0, hurt=None, **train):
    """hurt: what is done to the tracker after the first step; the others follow."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    config = make_config(folder, trackers=trackers, **train)
    check_trackers(config.train.trackers, load=True)
    with Reporter(folder, config, done=done, steps=20) as reporter:
        report(reporter, [done + 1], shift=shift)
        if hurt is not None:
            while not (folder / "trackers.json").exists():
                time.sleep(0.01)
            HURTS[hurt]()
        report(reporter, range(done + 2, until + 1), shift=shift)


def to_service(number):
    """Send a signal to the process that wandb starts for itself."""
    for process in psutil.Process().children(recursive=True):
        if "wandb-core" in process.name():
            process.send_signal(number)


def fill_disk():
    """From now on no file grows beyond 8 KiB: of the journals' none does, in 20 steps."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


HURTS = {
    "kill": lambda: to_service(signal.SIGKILL),
    "stop": lambda: to_service(signal.SIGSTOP),
    "full": fill_disk,
}

if __name__ == "__main__":
    start_logging()
    main(sys.argv[1], **json.loads(sys.argv[2]))
