"""One thread a rank that sees to it that all ranks stop together, within 20 s.

It waits for a signal to this process, the launcher's end, and news over the circle's connections
(circle.py). The first cause that any rank sees is told to all. Then, on each rank:

    the main thread may leave by itself   0 s after a signal, 2 s after another rank's failure: it
                                          may be about to raise the same error, or a better one
    SystemExit is raised in it            so that locks are released and temporary files removed;
                                          inside `told_to_stop` only an event is set
    the process is ended                  5 s later (15 s inside `told_to_stop`): it stands in a
                                          collective, which no signal handler interrupts

Signals come through a wake-up pipe, which C code writes to at once; a Python handler runs only when
the main thread returns from C (25 s late in a gloo collective). Should this thread get no turn, a
timer in C ends the process 5 s after that. What is committed stays committed: a kill at any point
is survived by the store, so nothing waits for the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from megadistill.launcher import LOOK_S, TERMINATED, launcher_is_there, take_over
from megadistill.parallel.circle import Line, call_hub, open_hub

log = logging.getLogger(__name__)

PATIENCE_S = 2.0  # for the main thread to leave by itself after another rank's failure
GRACE_S = 5.0  # from SystemExit to the end
SAVING_S = 15.0  # the same inside `told_to_stop`
BACKSTOP_S = 5.0
INTERRUPTED, FAILED = 130, 1  # exit codes, beside TERMINATED


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why all ranks stop."""

    rank: int  # where it was seen, or who it was that died
    reason: str
    code: int
    patience_s: float = 0.0
    lost: bool = False  # whether the rank is no more, and cannot speak
    told: bool = False  # whether the rank has reported it itself


class Watchdog:
    """Watches from `start` to `leave`; all methods but `_run` and below are the main thread's."""

    def __init__(self, *, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.cause: Cause | None = None
        self._seen_at = self._acted_at = 0.0
        self._known = threading.Event()  # a cause is known
        self._alone = threading.Event()  # every other rank has left
        self._told: threading.Event | None = None  # inside `told_to_stop`
        self._leaving = self._over = self._spoken = False
        self._selector = selectors.DefaultSelector()
        self._lines: dict[int, Line] = {}  # rank 0: of all others; elsewhere: to rank 0
        self._strangers: set[Line] = set()
        self._left: set[int] = set()
        self._hosts = {rank: socket.gethostname()}
        self._hub: socket.socket | None = None
        self._joined_at = self._looked_at = time.monotonic()
        self._heartbeat_s = 60.0
        self._lock = threading.Lock()  # of acting on a cause, and of taking it back
        self._devnull = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process lives
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._selector.register(self._pipe[0], selectors.EVENT_READ, self._on_signal_byte)
        self._restore: Callable[[], None] = lambda: None
        self._main = threading.current_thread()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watch signals and the launcher. Signals only where this is the main thread."""
        launcher_is_there()  # from here on
        if self._main is threading.main_thread():
            handler = signal.signal(signal.SIGTERM, self._in_main_thread)
            wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)

            def restore() -> None:
                signal.set_wakeup_fd(wakeup)
                signal.signal(signal.SIGTERM, handler)

            self._restore = restore
        me = weakref.ref(self)
        # A child that kept our connections would hide our death, and one that kept the pipe would
        # turn its own signals into ours, also those that come before it has let go.
        os.register_at_fork(
            before=lambda: _fork_signals(signal.SIG_BLOCK),
            after_in_parent=lambda: _fork_signals(signal.SIG_UNBLOCK),
            after_in_child=lambda: _forked(me()),
        )
        self._thread.start()
        take_over()

    def join(self, store: dist.Store, *, master: str, heartbeat_s: float) -> None:
        """Watch the other ranks, too. Collective over all ranks."""
        self._heartbeat_s, self._joined_at = heartbeat_s, time.monotonic()
        if self.rank == 0:
            self._hub, self._token = open_hub(store, world=self.world)
            self._hub.setblocking(False)
            self._selector.register(self._hub, selectors.EVENT_READ, self._on_call)
        else:
            line, host = call_hub(store, master=master, rank=self.rank, heartbeat_s=heartbeat_s)
            self._lines[0], self._hosts[0] = line, host
            self._selector.register(line, selectors.EVENT_READ, self._on_line)
        os.write(self._pipe[1], b"\0")

    @contextlib.contextmanager
    def told_to_stop(self) -> Iterator[threading.Event]:
        """An event in place of SystemExit: the main thread has SAVING_S to leave by itself."""
        self._told, done = threading.Event(), False
        try:
            if self._acted_at:
                self._told.set()
            yield self._told
            done = True
        finally:
            with self._lock:
                told, self._told = self._told.is_set(), None
                # Not after an error, which another rank's leaving for the same cause may be.
                if done and told and self.cause and self.cause.code != FAILED:
                    self._forget()  # what was asked for is done

    def settled(self, wait_s: float) -> Cause | None:
        """Why another rank's end may be what went wrong here; waits so long for news of it."""
        self._known.wait(wait_s)
        return self.cause

    def failed(self, error: BaseException) -> None:
        """This rank leaves with an error, which it reports itself: all others stop."""
        self._leaving = True
        if self.cause is None:
            reason = f"failed: {type(error).__name__}"
            self._see(Cause(self.rank, reason, FAILED, PATIENCE_S, told=True))

    def leave(self) -> None:
        """Stop watching. Rank 0 waits for the others, unless it has failed."""
        if self.rank == 0 and self.world > 1 and not self._leaving:
            self._check_left()
            self._alone.wait()  # it is rank 0 that has the process group's store
        self._leaving = True
        for line in self._lines.values():
            line.send({"left": True})
        self._over = True
        os.write(self._pipe[1], b"\0")
        if self._thread is not threading.current_thread():
            self._thread.join(PATIENCE_S)
        faulthandler.cancel_dump_traceback_later()
        self.close()

    # The thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._over:
            for key, _ in self._selector.select(timeout=0.2 if self.cause else LOOK_S):
                key.data(key.fileobj)
            now = time.monotonic()
            if self.cause is None and now - self._looked_at >= LOOK_S:
                self._looked_at = now
                self._look_around(now)
            with self._lock:
                if self.cause is not None and not self._over:
                    self._stop(now, self.cause)

    def _look_around(self, now: float) -> None:
        if not launcher_is_there():
            self._see(Cause(self.rank, "lost its launcher", TERMINATED))
        elif self._hub is not None and now - self._joined_at > self._heartbeat_s:
            away = set(range(1, self.world)) - self._lines.keys()
            if away:
                self._see(Cause(min(away), "did not come", FAILED, PATIENCE_S))

    def _see(self, cause: Cause) -> None:
        """Take the first cause for ours, and tell whom we can reach."""
        if self.cause is not None:
            return
        self.cause, self._seen_at = cause, time.monotonic()
        self._known.set()
        host = self._hosts.get(cause.rank)
        for line in list(self._lines.values()):
            line.send({"stop": {**dataclasses.asdict(cause), "host": host}})

    def _stop(self, now: float, cause: Cause) -> None:
        if self._acted_at:
            if now > self._acted_at + (SAVING_S if self._told else GRACE_S):
                os._exit(cause.code)
        elif now >= self._seen_at + cause.patience_s and not self._leaving:
            self._acted_at = now
            faulthandler.dump_traceback_later(
                (SAVING_S if self._told else GRACE_S) + BACKSTOP_S, exit=True, file=self._devnull
            )
            self.speak()
            if self._told is not None:
                self._told.set()
            elif self._main is threading.main_thread():
                signal.pthread_kill(self._main.ident, signal.SIGTERM)  # type: ignore[arg-type]

    def speak(self) -> None:
        """Say once why we stop: rank 0 does; where it is rank 0 that is lost, all others do."""
        if self.cause is None or self._spoken or self.cause.told:
            return
        self._spoken = True
        if self.rank == 0 or (self.cause.rank == 0 and self.cause.lost) or not self._lines:
            log.error(
                "rank %d on %s %s: all ranks stop; the same command goes on from what is saved",
                self.cause.rank, self._hosts.get(self.cause.rank, "an unknown host"),
                self.cause.reason,
            )  # fmt: skip

    def _on_signal_byte(self, pipe: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(pipe, 4096):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        if self.cause is not None:  # a launcher that ends its ranks: no patience is left
            self.cause = dataclasses.replace(self.cause, patience_s=0.0)
        elif number == signal.SIGTERM:
            self._see(Cause(self.rank, "got SIGTERM", TERMINATED))
        else:  # Python raises KeyboardInterrupt in the main thread by itself
            self._see(Cause(self.rank, "was interrupted", INTERRUPTED, PATIENCE_S))

    def _on_call(self, hub: socket.socket) -> None:
        with contextlib.suppress(OSError):
            line = Line(hub.accept()[0], self._heartbeat_s)
            self._strangers.add(line)
            self._selector.register(line, selectors.EVENT_READ, self._on_line)

    def _on_line(self, line: Line) -> None:
        messages, end = line.receive()
        for message in messages:
            self._on_message(line, message)
        if end is not None:
            self._selector.unregister(line)
            self._strangers.discard(line)
            for rank in [r for r, known in self._lines.items() if known is line]:
                if rank not in self._left:
                    self._see(Cause(rank, end, FAILED, PATIENCE_S, lost=True))

    def _on_message(self, line: Line, message: dict[str, Any]) -> None:
        if line in self._strangers:
            rank = int(message.get("rank", 0))
            if message.get("token") == self._token and 0 < rank < self.world:
                self._strangers.discard(line)
                self._lines[rank], self._hosts[rank] = line, str(message.get("host"))
        elif "stop" in message:
            told = dict(message["stop"])
            self._hosts[told["rank"]] = told.pop("host")
            self._see(Cause(**told))
        elif "left" in message:
            self._left |= {rank for rank, known in self._lines.items() if known is line}
            self._check_left()

    def _check_left(self) -> None:
        if len(self._left) == self.world - 1:
            self._alone.set()

    # Inside -------------------------------------------------------------------------------------

    def _in_main_thread(self, number: int, frame: object) -> None:
        if self._acted_at and self.cause and not self._leaving and self._told is None:
            sys.exit(self.cause.code)

    def _forget(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._known.clear()
        self.cause, self._acted_at, self._spoken = None, 0.0, False

    def close(self) -> None:
        """Let go of signals and connections."""
        self._restore()
        for held in (*self._lines.values(), *self._strangers, self._hub):
            if held is not None:
                held.close()


def _fork_signals(how: int) -> None:
    signal.pthread_sigmask(how, {signal.SIGTERM, signal.SIGINT})


def _forked(watchdog: Watchdog | None) -> None:
    if watchdog is not None:
        watchdog.close()
    _fork_signals(signal.SIG_UNBLOCK)
