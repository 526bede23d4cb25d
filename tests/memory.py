"""How much memory of its own this process takes: anonymous and shared, no mapped files."""

from __future__ import annotations

import threading
import time

MIB = 1 << 20


class PeakMemory:
    """Inside, the most that is taken, looked at every few milliseconds; in MiB over the start."""

    def __enter__(self) -> PeakMemory:
        self._start = self._most = _now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def taken(self) -> float:
        return (self._most - self._start) / MIB

    def _watch(self) -> None:
        while not self._done.is_set():
            self._most = max(self._most, _now())
            time.sleep(0.005)


def _now() -> int:
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
