"""The list of documents that were left out, `<data.dir>.run/skipped.jsonl`.

One line a document: its number in the corpus, where it stands, and why it was left out. A resumed
run reads some documents a second time; they are listed once.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from megadistill.data.encode import Unit

log = logging.getLogger(__name__)

_LOGGED = 10  # lines in the log; the file holds all of them


class Skipped:
    """Collects skipped documents; `write` appends them to the list in the store's run folder."""

    def __init__(self, folder: str) -> None:
        self.path = Path(f"{Path(folder)}.run", "skipped.jsonl")
        self.count = 0
        self._pending: list[dict[str, object]] = []
        self._listed: set[object] | None = None  # numbers in the file; None: not read yet

    def add(self, unit: Unit) -> None:
        self.count += 1
        if self.count <= _LOGGED:
            more = f" (all are listed in {self.path})" if self.count == _LOGGED else ""
            log.warning("skipped: %s: %s%s", unit.place, unit.problem, more)
        entry = {"document": unit.document, "place": unit.place, "problem": unit.problem}
        self._pending.append(entry)

    def write(self) -> None:
        """Appends what was added since the last call."""
        if not self._pending:
            return
        if self._listed is None:
            self._listed = self._open()
        new = [entry for entry in self._pending if entry["document"] not in self._listed]
        self._listed.update(entry["document"] for entry in new)
        self._pending.clear()
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in new)

    def _open(self) -> set[object]:
        """The documents listed by earlier runs. Drops a line that a killed run left unfinished."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return set()
        whole, _, rest = self.path.read_text(encoding="utf-8").rpartition("\n")
        if rest:
            self.path.write_text(whole + "\n" * bool(whole), encoding="utf-8")
        return {json.loads(line)["document"] for line in whole.splitlines()}
