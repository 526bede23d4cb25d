"""Progress of long work: a bar in a terminal, else a line in the log every half minute.

A bar keeps to one line of the terminal. Ten columns at least are the bar's own, and of the details
behind it only those are shown that fit. `LineHandler` writes the lines of the log above the bar.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from megadistill.storage.durations import readable_seconds

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0


class LineHandler(logging.StreamHandler):
    """Writes records to stderr, each on a line of its own: bars are cleared and drawn again."""

    def __init__(self) -> None:
        super().__init__()
        self._process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        # A forked process has copies of the bars, and of a lock that somebody may have held.
        if os.getpid() != self._process or not list(getattr(tqdm, "_instances", ())):
            super().emit(record)
            return
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class Bar(tqdm):
    """Progress bar that fits one line of the terminal, with details behind it.

    unit  a plural: blocks
    show  None: where standard error is a terminal
    """

    def __init__(
        self,
        what: str,
        *,
        total: int | None,
        unit: str,
        done: int = 0,
        show: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            total=total,
            initial=done,
            desc=what,
            unit=f" {unit}",
            dynamic_ncols=True,
            disable=not (sys.stderr.isatty() if show is None else show),
            **options,
        )

    def details(self, parts: Sequence[str]) -> None:
        """Show the first of `parts`, as many as fit beside a bar of ten columns."""
        if self.disable:
            return
        state = {**self.format_dict, "ncols": None}  # without ncols the bar has ten columns
        shown = ""
        for part in parts:
            longer = f"{shown}, {part}" if shown else part
            if self.ncols and len(self.format_meter(**{**state, "postfix": longer})) > self.ncols:
                break
            shown = longer
        self.set_postfix_str(shown, refresh=False)


class Progress:
    """Counts units against `total` (None: unknown). A context manager.

    show  a bar; None: where standard error is a terminal. Without a bar a line is logged every
          LINE_EVERY_S seconds.
    """

    def __init__(
        self,
        what: str,
        *,
        total: int | None,
        unit: str,
        done: int = 0,
        show: bool | None = None,
        **options: Any,
    ) -> None:
        self._bar = Bar(what, total=total, unit=unit, done=done, show=show, **options)
        self._what, self._unit, self._total = what, unit, total
        self._before = self._done = done
        self._begun = self._logged = time.monotonic()

    def add(self, count: int = 1, *, details: Sequence[str] = ()) -> None:
        """Count so many more; `details` stand behind the bar, or at the end of the line."""
        self._done += count
        self._bar.details(details)
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._logged >= LINE_EVERY_S:
            self._logged = now
            log.info("%s", ", ".join([self._line(now - self._begun), *details]))

    def _line(self, seconds: float) -> str:
        rate = (self._done - self._before) / max(seconds, 1e-9)
        of = "" if self._total is None else f" of {self._total}"
        line = f"{self._what}: {self._done}{of} {self._unit}, {rate:.3g} {self._unit}/s"
        if self._total is None or rate == 0:
            return line
        left = max(0, self._total - self._done) / rate
        return f"{line}, about {readable_seconds(left)} remaining"

    def __enter__(self) -> Progress:
        return self

    def close(self) -> None:
        self._bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class BlockProgress:
    """Progress over blocks for callbacks: `add` takes a block's number. A context manager."""

    def __init__(self, what: str, *, total: int | None, show: bool | None = None) -> None:
        self._progress = Progress(what, total=total, unit="blocks", show=show)

    def add(self, _block: int) -> None:
        self._progress.add()

    def __enter__(self) -> BlockProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
