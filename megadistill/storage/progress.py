"""Progress over blocks: a bar where somebody watches, else a line in the log now and then."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0


class BlockProgress:
    """Counts blocks against `total`; a context manager, whose `add` takes a block's number.

    show  a bar; None: where standard error is a terminal
    """

    def __init__(self, what: str, *, total: int, show: bool | None = None) -> None:
        show = sys.stderr.isatty() if show is None else show
        self._bar = tqdm(
            total=total, desc=what, unit=" blocks", dynamic_ncols=True, disable=not show
        )
        self._lines, self._what, self._total, self._done = not show, what, total, 0
        self._begun = self._said = time.monotonic()

    def add(self, _block: int) -> None:
        self._done += 1
        self._bar.update()
        now = time.monotonic()
        if self._lines and now - self._said >= LINE_EVERY_S:
            self._said = now
            rate = self._done / (now - self._begun)
            log.info(
                "%s: block %d of %d, %.3g blocks/s, %d s to go",
                self._what,
                self._done,
                self._total,
                rate,
                (self._total - self._done) / rate,
            )

    def __enter__(self) -> BlockProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
