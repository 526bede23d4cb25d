"""Locks of stores: one run writes at a time, and takes over the lock of a dead run.

The lock is a file that says who holds it: host, boot, process and its start. The holder touches
the file every few seconds through its own descriptor, so a holder that was replaced can never
touch its successor's. An observer believes a holder dead when the same kernel has no such process,
or when the file's time stood still for `patience_s` of the observer's own clock: clocks of two
hosts are never compared.

A holder that slept through its patience is replaced without knowing. So each holder has a token,
and whoever writes for it, on whatever rank or host, compares it with the file's before every commit
(under 0.1 ms): a store object belongs to the run that held the lock when it was made.
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
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from megadistill.errors import CorruptBlockError, LockedError, StoreError
from megadistill.storage.files import named_os_errors, read_file

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0

PATIENCE_S = 60.0  # of store locks: a holder on another host counts as dead after so long
RUN_LOCK = "run.lock"  # in train.out_dir


def store_lock(store: Path) -> Path:
    """The lock of a block store, in the folder beside it. Two names of one store share it."""
    path = store.resolve()
    return path.parent / f"{path.name}.run" / "lock"


class StoreLock:
    """A lock file, held between `__enter__` and `__exit__`.

    LockedError while another holds it, StoreError where the file cannot be written. `clock` and
    `sleep` are for tests.
    """

    def __init__(
        self,
        path: Path,
        *,
        what: str,
        patience_s: float,
        depth: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.path, self.what, self.patience_s, self._depth = path, what, patience_s, depth
        self._clock, self._sleep = clock, sleep
        self.token = uuid.uuid4().hex
        self.entered = False
        self._stop = threading.Event()
        self._handle: int | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StoreLock:
        ours = self.path.with_name(f"{self.path.name}.{self.token}")
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        with named_os_errors("take the lock", self.path):
            try:
                ours.write_text(json.dumps(_identity() | {"since": since, "nonce": self.token}))
                self._acquire(ours)
                self._handle = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            finally:
                with contextlib.suppress(OSError):
                    ours.unlink(missing_ok=True)
        self.entered = True
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
        self.entered = False
        with contextlib.suppress(OSError):  # a lock that stays is that of a dead process, soon
            if self.held():
                self.path.unlink(missing_ok=True)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def require_free(self) -> None:
        """LockedError while another process holds the lock. Takes and writes nothing."""
        holder = _read(self.path)
        if holder is not None and not self._dead(holder):
            raise self._held_by(holder)

    def held(self) -> bool:
        """Whether this run still holds the lock: False after another run has taken it over."""
        return token_of(self.path) == self.token

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
                raise self._held_by(holder)
            if self._take_over(ours, holder):
                log.warning("%s: took over the lock of %s, which is dead", self.what, _who(holder))
                return
        raise StoreError(f"{self.path}: could not be taken: remove it if no run is alive")

    def _held_by(self, holder: dict[str, Any]) -> LockedError:
        return LockedError(
            f"{self.what}: is being written by {_who(holder)}: wait for it, or stop it"
        )

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
            clock=self._clock,
            sleep=self._sleep,
        )
        with guard:
            if _read(self.path) != holder:
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
        log.info("%s: waiting for a sign of life from %s", self.what, _who(holder))
        seen, until = _touched(self.path), self._clock() + self.patience_s
        while self._clock() < until:
            self._sleep(min(0.5, self.patience_s / 4))
            if _touched(self.path) != seen:
                return False
        return True

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._handle)  # type: ignore[arg-type]  # open until the thread has ended


def token_of(path: Path) -> str | None:
    """Returns the token of a lock's holder; None without one, or if the lock cannot be read."""
    with contextlib.suppress(StoreError):
        return _token(_read(path))
    return None


def require_holder(path: Path, token: str | None, *, what: str) -> None:
    """Raises LockedError unless the lock is held under `token`; None: by no process."""
    holder = _read(path)
    if _token(holder) == token:
        return
    if holder is None:
        raise LockedError(f"{what}: the run that wrote it has ended, or its lock was removed: stop")
    raise LockedError(f"{what}: {_who(holder)} has taken it over and writes it now: stop this run")


def _token(holder: dict[str, Any] | None) -> str | None:
    return None if holder is None else str(holder.get("nonce"))


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process whose lock file is damaged"
    pid, host, since = (str(holder.get(key, "?"))[:80] for key in ("pid", "host", "since"))
    return f"process {pid} on {host} since {since}"


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
    stat = _text(f"/proc/{pid}/stat") if type(pid) is int else ""
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
    """Returns the content of a lock file: None where there is none, {} where it is damaged."""
    try:
        holder = json.loads(read_file(path, limit=1 << 16))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, CorruptBlockError):
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
