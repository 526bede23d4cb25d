"""Progress over a corpus: documents against their number, with the tokens and their rate."""

from __future__ import annotations

import os
import sys
import time

from megadistill.storage.progress import Progress


class CorpusProgress:
    """Counts documents against `total` (None: unknown). A context manager.

    show  a bar; None: where rank 0 has a terminal
    """

    def __init__(self, *, total: int | None, done: int = 0, show: bool | None = None) -> None:
        if show is None:
            show = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        self._progress = Progress(
            "tokenising", total=total, unit="documents", done=done, show=show, unit_scale=True
        )
        self._tokens, self._begun = 0, time.monotonic()

    def add(self, documents: int, *, tokens: int) -> None:
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._begun, 1e-9)
        details = [f"{self._tokens / 1e6:.1f}M tokens", f"{rate / 1e6:.2f}M tokens/s"]
        self._progress.add(documents, details=details)

    def __enter__(self) -> CorpusProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
