"""Progress over a corpus: a bar where somebody watches, else a line in the log now and then."""

from __future__ import annotations

import logging
import os
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0


class Progress:
    """Counts documents against `total` (None: unknown). A context manager.

    `show`: a bar; None: where rank 0 has a terminal.
    """

    def __init__(self, *, total: int | None, done: int = 0, show: bool | None = None) -> None:
        if show is None:
            show = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        self._bar = tqdm(
            total=total,
            initial=done,
            desc="tokenising",
            unit=" documents",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not show,
        )
        self._lines = not show
        self._total, self._done, self._tokens = total, done, 0
        self._begun = self._said = time.monotonic()

    def add(self, documents: int, *, tokens: int) -> None:
        self._done += documents
        self._tokens += tokens
        now = time.monotonic()
        rate = self._tokens / max(now - self._begun, 1e-9)
        self._bar.set_postfix_str(
            f"{self._tokens / 1e6:.1f}M tokens, {rate / 1e6:.2f}M/s", refresh=False
        )
        self._bar.update(documents)
        if self._lines and now - self._said >= LINE_EVERY_S:
            self._said = now
            of = "" if self._total is None else f" of {self._total}"
            log.info(
                "tokenising: document %d%s, %.1fM tokens, %.2fM/s",
                self._done,
                of,
                self._tokens / 1e6,
                rate / 1e6,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
