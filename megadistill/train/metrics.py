"""What a step reports: a line in metrics.jsonl, a line for people.

metrics.jsonl holds one JSON object a step, steps counted from 1, losses in nats a position, times
in seconds. After a resume the lines of steps that are done again are dropped, so that the file of
an interrupted run reads like that of an undisturbed one (times aside).
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from megadistill.train.readings import readings_line

log = logging.getLogger(__name__)
QUIET_S = 10.0  # without a terminal: seconds between lines


class Journal:
    """A file of JSON lines that carry a step, and that a resumed run cuts back to its step."""

    def __init__(self, path: Path, *, done: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                # A killed run may have left half a line at the end.
                if line.endswith("\n") and json.loads(line)["step"] <= done:
                    kept.append(line)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self._file: TextIO = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def step_line(record: dict[str, Any], steps: int) -> str:
    """One step for people."""
    kd = "" if record["kd_loss"] is None else f"  kd {record['kd_loss']:.4f}"
    return (
        f"step {record['step']}/{steps}  loss {record['loss']:.4f}{kd}  ce {record['ce_loss']:.4f}"
        f"  lr {record['lr']:.2e}  |g| {record['grad_norm']:.3f}"
        f"  {record['tokens_per_s'] / 1e3:.1f}k tok/s  data {record['data_s']:.3f} s"
        f"  step {record['step_s']:.3f} s{readings_line(record)}"
    )


class Reporter:
    """Rank 0's voice: metrics.jsonl, a bar in a terminal, or a line every few seconds."""

    def __init__(self, folder: Path, *, done: int, steps: int) -> None:
        self.metrics = Journal(folder / "metrics.jsonl", done=done)
        self.evaluations = Journal(folder / "eval.jsonl", done=done)
        self._steps, self._spoke = steps, 0.0
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=done, unit="step", desc="train", smoothing=0.05)

    def step(self, record: dict[str, Any]) -> None:
        self.metrics.write(record)
        if record["loss"] is None:
            return  # a step that was skipped; why has been said
        line = step_line(record, self._steps)
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix_str(line.split("  ", 1)[1])
        elif time.monotonic() - self._spoke > QUIET_S or record["step"] == self._steps:
            log.info("%s", line)
            self._spoke = time.monotonic()

    def evaluation(self, record: dict[str, Any]) -> None:
        self.evaluations.write(record)
        log.info(
            "held out, step %d: loss %.4f  perplexity %.2f  KL to teacher %.4f  top-1 agreement "
            "%.2f %%", record["step"], record["loss"], record["perplexity"], record["kl"],
            100 * record["top1_agreement"],
        )  # fmt: skip

    def close(self) -> None:
        for journal in (self.metrics, self.evaluations):
            journal.close()
        if self._bar is not None:
            self._bar.close()
