"""metrics.jsonl and eval.jsonl: one JSON object a line, each with its step, counted from 1.

A line is written when its step is done, so that a killed run leaves half a line at most, and that
at the end. After a resume the lines of steps that are done again are dropped: the file of an
interrupted run reads like that of an undisturbed one (times aside). These files are the
record of a run; trackers receive the same lines and may lose some.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from megadistill.errors import TrainError

JOURNALS = ("metrics.jsonl", "eval.jsonl")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file, in order, without a half line at the end; [] without a file.

    Raises TrainError, naming the line, if a line is no record of a step.
    """
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise TrainError(f"{path}: cannot be read: {error.strerror or error}") from None
    # Not splitlines: it also cuts at characters that stand within a line.
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            shown = line if len(line) < 60 else f"{line[:56]} ..."
            raise TrainError(
                f"{path}: line {number} is no record of a step: found {shown!r}, expected a JSON "
                'object with "step": the file is damaged; take that line out'
            )
        yield line + "\n", record


class JsonlLog:
    """A jsonl file for appending, truncated to the step that a resumed run continues from."""

    def __init__(self, path: Path, *, done: int) -> None:
        lines = list(_lines(path))
        self.reached = max((record["step"] for _, record in lines), default=0)  # before the cut
        kept = [line for line, record in lines if record["step"] <= done]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self._file: TextIO = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
