"""Watchdog thread of each rank: all ranks stop together, within 20 s.

It waits for a signal to this process, the end of the launcher, and messages of the other ranks
(liveness.py). The first cause that any rank sees is sent to all. Then, on each rank:

    the main thread may leave by itself   0 s after a signal, 2 s after another rank's failure: it
                                          may be about to raise the same error, or a better one
    SystemExit is raised in it            so that locks are released and temporary files removed;
                                          inside `graceful_stop` a `Stop` is set instead
    the process is ended                  5 s later (15 s inside `graceful_stop`): it stands in a
                                          collective, which no signal handler interrupts

SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) all stop a run in this way, each with its
own exit code, unless the process was started with the signal ignored (nohup). A second Ctrl-C ends
all ranks at once. Launchers forward signals, so what comes within 0.5 s counts as the same one:
`deepspeed` sends SIGTERM to its ranks after Ctrl-C, and SIGKILL 30 s later; torchrun sends SIGINT,
and SIGKILL 30 s later.

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

from megadistill.launcher import (
    HUNG_UP,
    INTERRUPTED,
    LOOK_S,
    TERMINATED,
    launcher_is_there,
    take_over,
)
from megadistill.parallel.liveness import Line, call_hub, open_hub

log = logging.getLogger(__name__)

PATIENCE_S = 2.0  # for the main thread to leave by itself after another rank's failure
GRACE_S = 5.0  # from SystemExit to the end
SAVING_S = 15.0  # the same inside `graceful_stop`
BACKSTOP_S = 5.0
FORWARDED_S = 0.5  # a second SIGINT within this time is a launcher's copy of the first
FAILED = 1  # exit code
# Signal: (what its rank reports, exit code as a shell gives it).
_SIGNALS = {
    signal.SIGINT: ("got SIGINT (Ctrl-C)", INTERRUPTED),
    signal.SIGTERM: ("got SIGTERM", TERMINATED),
    signal.SIGHUP: ("got SIGHUP (its terminal closed)", HUNG_UP),
}


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why all ranks stop."""

    rank: int  # where it was seen, or who it was that died
    reason: str
    code: int
    patience_s: float = 0.0
    lost: bool = False  # whether the rank is no more, and cannot speak
    reported: bool = False  # whether the rank has reported it itself


class Stop:
    """The stop event, for work inside `graceful_stop`: set when the ranks must stop."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._until = float("inf")
        self.code = 0  # for the process, once a stop is requested

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    @property
    def left_s(self) -> float:
        """Seconds until this process is ended; infinity where no stop is requested."""
        return self._until - time.monotonic()

    def wait(self, seconds: float) -> bool:
        """Waits up to `seconds` for a stop request. Returns whether there is one."""
        return self._event.wait(seconds)

    def set(self, code: int, until: float) -> None:
        """Request the stop. `until` is of time.monotonic."""
        self.code, self._until = code, until
        self._event.set()


class Watchdog:
    """Watches from `start` to `leave`; all methods but `_run` and below are the main thread's."""

    def __init__(self, *, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.cause: Cause | None = None
        self._seen_at = self._acted_at = 0.0
        self._known = threading.Event()  # a cause is known
        self._alone = threading.Event()  # every other rank has left
        self._graceful: Stop | None = None  # inside `graceful_stop`
        self._interrupted_at: float | None = None  # the first Ctrl-C
        self._at_once = False  # a second Ctrl-C
        self.account: Callable[[], str] | None = None  # see `conclude`
        self._raised = False  # SystemExit, in the main thread
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
            # What is ignored stays ignored: nohup, and jobs in the background of a script.
            handlers = {
                number: signal.signal(number, self._in_main_thread)
                for number in _SIGNALS
                if signal.getsignal(number) is not signal.SIG_IGN
            }
            wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)

            def restore() -> None:
                signal.set_wakeup_fd(wakeup)
                for number, handler in handlers.items():
                    signal.signal(number, handler)

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
        """Watches the other ranks as well. Collective over all ranks."""
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
    def graceful_stop(self) -> Iterator[Stop]:
        """Yields a `Stop` instead of raising SystemExit: the main thread has SAVING_S to leave."""
        stop, done = Stop(), False
        with self._lock:
            self._graceful = stop
            if self._acted_at and self.cause:
                stop.set(self.cause.code, self._acted_at + SAVING_S)
        try:
            yield stop
            done = True
        finally:
            with self._lock:
                self._graceful = None
                # Not after an error, which another rank's leaving for the same cause may be.
                if done and stop.requested and self.cause and self.cause.code != FAILED:
                    self._forget()  # what was asked for is done

    def settled(self, wait_s: float) -> Cause | None:
        """Waits up to wait_s for a cause of stopping. Returns it, or None."""
        self._known.wait(wait_s)
        return self.cause

    def failed(self, error: BaseException) -> None:
        """Stops all other ranks: this rank leaves with an error, which it reports itself."""
        self._leaving = True
        if self.cause is None:
            reason = f"failed: {type(error).__name__}"
            self._see(Cause(self.rank, reason, FAILED, PATIENCE_S, reported=True))

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
        """Adopts the first cause, and sends it to every rank that can be reached."""
        if self.cause is not None:
            return
        self.cause, self._seen_at = cause, time.monotonic()
        self._known.set()
        host = self._hosts.get(cause.rank)
        for line in list(self._lines.values()):
            line.send({"stop": {**dataclasses.asdict(cause), "host": host}})

    def _stop(self, now: float, cause: Cause) -> None:
        limit_s = SAVING_S if self._graceful else GRACE_S
        if self._at_once or (self._acted_at and now > self._acted_at + limit_s):
            faulthandler.dump_traceback_later(BACKSTOP_S, exit=True, file=self._devnull)
            self.speak()
            self.conclude()
            os._exit(cause.code)
        if not self._acted_at and now >= self._seen_at + cause.patience_s and not self._leaving:
            self._acted_at = now
            faulthandler.dump_traceback_later(limit_s + BACKSTOP_S, exit=True, file=self._devnull)
            self.speak()
            if self._graceful is not None:
                self._graceful.set(cause.code, now + limit_s)
            elif self._main is threading.main_thread():
                signal.pthread_kill(self._main.ident, signal.SIGTERM)  # type: ignore[arg-type]

    def speak(self) -> None:
        """Logs once why the ranks stop: on rank 0, or on all others if rank 0 is lost."""
        if self.cause is None or self._spoken or self.cause.reported:
            return
        self._spoken = True
        if not self._speaks(self.cause):
            return
        then = "" if self.account else "; the same command resumes from what is saved"
        if self._graceful is not None and self.cause.code != FAILED:
            then = ", within 15 s, when the current step is done"
            then += "; Ctrl-C again ends them at once" if self.cause.code == INTERRUPTED else ""
        log.log(
            logging.ERROR if self.cause.code == FAILED else logging.WARNING,
            "rank %d on %s %s: all ranks stop%s",
            self.cause.rank,
            self._hosts.get(self.cause.rank, "an unknown host"),
            self.cause.reason,
            then,
        )

    def conclude(self) -> None:
        """Logs once the line of `account`, which says what is saved. On the ranks that `speak`."""
        account, self.account = self.account, None
        if account is not None and self.cause is not None and self._speaks(self.cause):
            log.warning("%s", account())

    def _speaks(self, cause: Cause) -> bool:
        return self.rank == 0 or (cause.rank == 0 and cause.lost) or not self._lines

    def _on_signal_byte(self, pipe: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(pipe, 4096):
                if number in _SIGNALS:
                    self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now > self._interrupted_at + FORWARDED_S:
                self._end_at_once()
        if self.cause is not None:  # a launcher that ends its ranks: no patience is left
            self.cause = dataclasses.replace(self.cause, patience_s=0.0)
            return
        reason, code = _SIGNALS[signal.Signals(number)]
        self._see(Cause(self.rank, reason, code))

    def _end_at_once(self) -> None:
        """Ends this process, and all others, in the next round."""
        if not self._at_once:
            self._at_once = True
            for line in list(self._lines.values()):
                line.send({"at_once": True})

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
            reported = dict(message["stop"])
            self._hosts[reported["rank"]] = reported.pop("host")
            self._see(Cause(**reported))
        elif "at_once" in message:
            self._end_at_once()
        elif "left" in message:
            self._left |= {rank for rank, known in self._lines.items() if known is line}
            self._check_left()

    def _check_left(self) -> None:
        if len(self._left) == self.world - 1:
            self._alone.set()

    # Inside -------------------------------------------------------------------------------------

    def _in_main_thread(self, number: int, frame: object) -> None:
        if self._raised or not self._acted_at or not self.cause:
            return
        if not self._leaving and self._graceful is None:
            # Once: a signal that is still pending must not cut short what runs on the way out.
            self._raised = True
            sys.exit(self.cause.code)

    def _forget(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._known.clear()
        self.cause, self._acted_at, self._spoken = None, 0.0, False
        self._interrupted_at, self._raised = None, False

    def close(self) -> None:
        """Restores signal handlers and closes connections."""
        self._restore()
        for held in (*self._lines.values(), *self._strangers, self._hub):
            if held is not None:
                held.close()


def _fork_signals(how: int) -> None:
    signal.pthread_sigmask(how, set(_SIGNALS))


def _forked(watchdog: Watchdog | None) -> None:
    if watchdog is not None:
        watchdog.close()
    _fork_signals(signal.SIG_UNBLOCK)
