"""Reports of each step: a line in metrics.jsonl (jsonl_log.py), a readable line, and to trackers.

Losses are in nats a position, times in seconds.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from megadistill.config import Config
from megadistill.storage.progress import Bar
from megadistill.train.reporting.device_stats import readings_line
from megadistill.train.reporting.jsonl_log import JsonlLog
from megadistill.train.reporting.trackers import Trackers

log = logging.getLogger(__name__)
QUIET_S = 10.0  # without a terminal: seconds between lines


def step_line(record: dict[str, Any], steps: int) -> str:
    """Returns a readable line for one step.

    In place of kd_loss stands the KL to the teacher where it is known: from sampled targets kd_loss
    is a cross-entropy, above it by the teacher's entropy.
    """
    losses = {
        key.removesuffix("_loss"): value
        for key, value in record.items()
        if key.endswith("_loss") and value is not None
    }
    if "kl" in record:
        losses = {"kl": record["kl"]} | {k: v for k, v in losses.items() if k != "kd"}
    terms = "".join(f"  {name} {value:.4f}" for name, value in losses.items())
    teacher = f"  teacher {record['teacher_s']:.3f} s" if "teacher_s" in record else ""
    return (
        f"step {record['step']}/{steps}  loss {record['loss']:.4f}{terms}"
        f"  lr {record['lr']:.2e}  |g| {record['grad_norm']:.3f}"
        f"  {record['tokens_per_s'] / 1e3:.1f}k tok/s  data {record['data_s']:.3f} s"
        f"{teacher}  step {record['step_s']:.3f} s{readings_line(record)}"
    )


class Reporter:
    """Rank 0's voice: the journals, a bar in a terminal or a line every few seconds, trackers.

    A context manager. TrainError for a journal that is damaged.
    """

    def __init__(self, folder: Path, config: Config, *, done: int, steps: int) -> None:
        self.metrics = JsonlLog(folder / "metrics.jsonl", done=done)
        self.evaluations = JsonlLog(folder / "eval.jsonl", done=done)
        given = {"train": self.metrics.reached, "eval": self.evaluations.reached}
        self._trackers = Trackers(config, folder, done=done, given=given)
        self._done, self._steps, self._spoke = done, steps, 0.0
        self._bar: Bar | None = None

    def __enter__(self) -> Reporter:
        if sys.stderr.isatty():
            self._bar = Bar(
                "train", total=self._steps, done=self._done, unit="steps", smoothing=0.05
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for journal in (self.metrics, self.evaluations):
            journal.close()
        if self._bar is not None:
            self._bar.close()
        self._trackers.close(finished=self._done == self._steps, failed=error is not None)

    def step(self, record: dict[str, Any]) -> None:
        self.metrics.write(record)
        self._trackers.log("train", record)
        self._done = record["step"]
        if record["loss"] is None:
            return  # a step that was skipped; why has been said
        line = step_line(record, self._steps)
        if self._bar is not None:
            self._bar.details(line.split("  ")[1:])
            self._bar.update()
        elif time.monotonic() - self._spoke > QUIET_S or record["step"] == self._steps:
            log.info("%s", line)
            self._spoke = time.monotonic()

    def evaluation(self, record: dict[str, Any]) -> None:
        self.evaluations.write(record)
        self._trackers.log("eval", record)
        log.info(
            "held out, step %d: loss %.4f  perplexity %.2f  KL to teacher %.4f  top-1 agreement "
            "%.2f %%  calibration error %.4f",
            record["step"],
            record["loss"],
            record["perplexity"],
            record["kl"],
            100 * record["top1_agreement"],
            record["calibration_error"],
        )
