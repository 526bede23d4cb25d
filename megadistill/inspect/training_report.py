"""Reports of one or several training runs, read from their folders: a table as Markdown.

The folder has run.json, metrics.jsonl (a line per step) and eval.jsonl (a line per held-out
evaluation). The run may still be training. Imports no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.errors import TrainError
from megadistill.storage.records import read_json
from megadistill.targets import METHODS, find_method
from megadistill.train.reporting.jsonl_log import read_records

Record = dict[str, Any]

_LAST = 0.1  # of the steps so far: what the loss in the table is the mean of, for its noise


@dataclass(frozen=True)
class RunRecords:
    """Records of a run, read from its folder."""

    path: Path
    name: str  # what tables and pictures call it
    planned: int  # steps of the whole run
    steps: list[Record]  # of metrics.jsonl
    evaluations: list[Record]  # of eval.jsonl
    is_sampled: bool = False  # whether a cache holds sampled targets: kd_loss is a cross-entropy


def read_run(path: str | Path, *, name: str | None = None) -> RunRecords:
    """Reads the run in a folder. Raises TrainError if there is none, or if it has no step yet."""
    path = Path(path)
    identity = path / "run.json"
    if not identity.is_file():
        what = "has no run.json" if path.is_dir() else "there is no such folder"
        raise TrainError(
            f"{path}: is no training run ({what}): name a folder that was a run's train.out_dir"
        )
    begun = read_json(identity)
    planned = begun.get("train", {}).get("steps", 0)
    methods = [cache["recipe"].get("method") for cache in begun.get("cache", {}).values()]
    steps = read_records(path / "metrics.jsonl")
    if not steps:
        raise TrainError(
            f"{path}: the run has no step yet (nothing in metrics.jsonl): wait until it has one"
        )
    return RunRecords(
        path,
        name or str(path),
        planned,
        steps,
        read_records(path / "eval.jsonl"),
        is_sampled=any(name in METHODS and find_method(name).sampled for name in methods),
    )


def read_runs(paths: list[str]) -> list[RunRecords]:
    """Reads runs; several are named by the shortest part of their paths that distinguishes them."""
    if len(paths) == 1:
        return [read_run(paths[0])]
    whole = [Path(path).resolve() for path in paths]
    twice = [path for path, real in zip(paths, whole, strict=True) if whole.count(real) > 1]
    if twice:
        raise TrainError(f"{twice[-1]}: is named twice: name each run once")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    names = [str(Path(*path.parts[-depth:])) for path in whole]
    return [read_run(path, name=name) for path, name in zip(paths, names, strict=True)]


def values(records: Iterable[Record], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that hold a number for `key`; a skipped step has none."""
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [step for step, _ in points], [float(value) for _, value in points]


def report(runs: list[RunRecords], *, picture: str | None = None) -> str:
    """Returns Markdown: runs and held-out evaluations in rows. picture: a file to show above."""
    title = "Training run" if len(runs) == 1 else f"{len(runs)} training runs"
    parts = [f"# {title}"]
    if picture is not None:
        parts.append(f"![curves]({picture})")
    parts.append(run_table(runs))
    if any(run.evaluations for run in runs):
        parts += ["## On held-out text", held_out_table(runs)]
    return "\n\n".join(parts) + "\n"


def run_table(runs: list[RunRecords]) -> str:
    """Returns a row per run: steps, losses of training, and speed."""
    has_kl = any(values(run.steps, "kl")[1] for run in runs)
    columns: dict[str, Callable[[RunRecords], str]] = {
        "run": lambda run: _code(run.name),
        "steps": lambda run: f"{run.steps[-1]['step']:,} of {run.planned:,}",
        "tokens": lambda run: _count(run.steps[-1].get("tokens")),
        "loss": lambda run: _number(_recent(run, "loss"), ".4f"),
        "cross-entropy": lambda run: _number(_recent(run, "ce_loss"), ".4f"),
        **({"KL to teacher": _recent_kl} if has_kl else {}),
        "tokens/s": lambda run: _number(_median(run, "tokens_per_s"), ",.0f"),
        "hours": lambda run: _number(sum(values(run.steps, "step_s")[1]) / 3600, ".2f"),
    }
    if any(_skipped(run) for run in runs):
        columns["skipped"] = lambda run: f"{_skipped(run)}"
    rows = [[cell(run) for cell in columns.values()] for run in runs]
    note = (
        f"Loss and cross-entropy: of the training text, mean of the last {_LAST:.0%} of the steps, "
        "nats a position; the loss is what the run minimises. Hours: in steps, without evaluating "
        "and saving."
    )
    if "KL to teacher" in columns:
        note += (
            " KL to teacher: the same mean. From sampled targets it is the cross-entropy with them "
            "less the teacher's entropy, an unbiased estimate, which may be negative."
        )
    return f"{_table(list(columns), rows)}\n\n{note}"


HELD_OUT = {
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "kl": ("KL to teacher", ".4f"),
    "top1_agreement": ("top-1 agreement", ".1%"),
    "calibration_error": ("calibration error", ".4f"),
}


def held_out_table(runs: list[RunRecords]) -> str:
    """Returns the last evaluation of each run, and that of the lowest loss if it is another."""
    rows = []
    for run in runs:
        if not run.evaluations:
            rows.append([_code(run.name), *("-" for _ in range(2 + len(HELD_OUT)))])
            continue
        last = run.evaluations[-1]
        best = min(run.evaluations, key=lambda r: _sortable(r.get("loss")))
        for which, record in (("last", last), ("lowest loss", best))[: 1 if best is last else 2]:
            figures = [_number(record.get(key), form) for key, (_, form) in HELD_OUT.items()]
            rows.append([_code(run.name), which, f"{record['step']:,}", *figures])
    teachers = {
        _number(loss, ".4f")
        for run in runs
        for loss in values(run.evaluations[-1:], "teacher_loss")[1]
    }
    table = _table(["run", "evaluation", "step", *(title for title, _ in HELD_OUT.values())], rows)
    note = f"\n\nThe teacher's own loss: {', '.join(sorted(teachers))}." if teachers else ""
    return table + note


def _recent(run: RunRecords, key: str) -> float | None:
    found = values(run.steps, key)[1]
    return statistics.fmean(found[-max(1, round(_LAST * len(found))) :]) if found else None


def _recent_kl(run: RunRecords) -> str:
    return _number(_recent(run, "kl"), ".4f")


def _median(run: RunRecords, key: str) -> float | None:
    found = values(run.steps, key)[1]
    return statistics.median(found) if found else None


def _skipped(run: RunRecords) -> int:
    return sum(bool(record.get("skipped")) for record in run.steps)


def _sortable(loss: Any) -> float:
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else math.inf


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else "-"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns also lined up for the terminal."""
    cells = [titles, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in cells
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])
