"""The right to write a store: one run at a time, and a dead run's lock taken over.

The lock is a file that says who holds it: host, boot, process and its start. The holder touches
the file every few seconds through its own descriptor, so a holder that was replaced can never
touch its successor's. An observer believes a holder dead when the same kernel has no such process,
or when the file's time stood still for `patience_s` of the observer's own clock: clocks of two
hosts are never compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from megadistill.errors import LockedError, StoreError

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0


class StoreLock:
    """A lock file, held between `__enter__` and `__exit__`. LockedError while another holds it."""

    def __init__(self, path: Path, *, what: str, patience_s: float, depth: int = 0) -> None:
        self.path, self.what, self.patience_s, self._depth = path, what, patience_s, depth
        self._nonce = uuid.uuid4().hex
        self._stop = threading.Event()
        self._handle: int | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StoreLock:
        ours = self.path.with_name(f"{self.path.name}.{self._nonce}")
        ours.write_text(json.dumps(_identity() | {"nonce": self._nonce}))
        try:
            self._acquire(ours)
            self._handle = os.open(self.path, os.O_RDWR)
        finally:
            ours.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._beat, name="store-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        if self.held():
            self.path.unlink(missing_ok=True)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def held(self) -> bool:
        """Whether the lock is still ours: False after another run took us for dead."""
        return (_read(self.path) or {}).get("nonce") == self._nonce

    def _acquire(self, ours: Path) -> None:
        for _ in range(100):
            try:
                os.link(ours, self.path)  # appears whole, or not at all
                return
            except FileExistsError:
                pass
            holder = _read(self.path)
            if holder is None:
                continue  # released since
            if not self._dead(holder):
                raise LockedError(
                    f"{self.what}: is being written by process {holder.get('pid')} on "
                    f"{holder.get('host')}: wait for it, or stop it"
                )
            if self._take_over(ours, holder):
                log.warning(
                    "%s: took over the lock of process %s on %s, which is dead",
                    self.what,
                    holder.get("pid"),
                    holder.get("host"),
                )
                return
        raise StoreError(f"{self.path}: could not be taken: remove it if no run is alive")

    def _take_over(self, ours: Path, holder: dict[str, Any]) -> bool:
        # Two observers may find the same dead holder: the second lock decides who replaces it, so
        # that nobody removes a lock that was taken in between. A third level is never needed.
        if self._depth > 1:
            raise LockedError(f"{self.path}: several runs are taking it over: try again")
        guard = StoreLock(
            self.path.with_name(f"{self.path.name}.takeover"),
            what=self.what,
            patience_s=self.patience_s,
            depth=self._depth + 1,
        )
        with guard:
            if (_read(self.path) or {}).get("nonce") != holder.get("nonce"):
                return False
            copy = ours.with_name(f"{ours.name}.new")
            os.link(ours, copy)
            os.replace(copy, self.path)
            return True

    def _dead(self, holder: dict[str, Any]) -> bool:
        here = _identity()
        # Host names repeat, and containers share a kernel: only the same process table is proof.
        if all(holder.get(key) == here[key] for key in ("host", "boot", "processes")):
            return _started(holder.get("pid")) != holder.get("started")
        log.info("%s: waiting for a sign of life from %s", self.what, holder.get("host"))
        seen, until = _touched(self.path), time.monotonic() + self.patience_s
        while time.monotonic() < until:
            time.sleep(min(0.5, self.patience_s / 4))
            if _touched(self.path) != seen:
                return False
        return True

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._handle)  # type: ignore[arg-type]  # open until the thread has ended


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "processes": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: object) -> str | None:
    """When a process began, in the kernel's ticks; None where there is none. Numbers are reused."""
    stat = _text(f"/proc/{pid}/stat")
    if not stat:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] == "Z" else fields[19]


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _touched(path: Path) -> tuple[int, int] | None:
    # Opened, because a network file system refreshes what it knows of a file on opening it.
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
