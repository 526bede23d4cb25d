"""Tokenising processes: batches in, encoded batches out, in the order they went in.

Plain child processes talking pickle over their pipes, rather than multiprocessing: its children
import the main script again (torch and DeepSpeed, under our launchers), its pools wait for ever
when a child is killed, and its children stay when the parent is. These import what `encode` needs,
a dead child is an error at once, and all end by themselves when their input does.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from megadistill.data.encode import Encoder, EncoderSpec, Unit
from megadistill.errors import DataError


class Workers:
    """`count` processes with an Encoder each. A context manager: leaving it ends them."""

    def __init__(self, spec: EncoderSpec, *, count: int) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = [_Worker() for _ in range(count)]
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="tokenise")
        try:
            for worker in self._all:
                worker.send(spec)
            for worker in self._all:  # all start beside each other; each says when it is ready
                worker.receive()
                self._idle.put(worker)
        except BaseException:
            self.__exit__()
            raise

    def encode(self, batches: Iterable[list[Unit]]) -> Iterator[tuple[list[Unit], Any]]:
        """Each batch with what Encoder.encode gives for it, in order.

        A unit that cannot be encoded comes back with its `problem`. At most two batches a process
        are under way: what bounds the memory.
        """
        under_way: deque[tuple[list[Unit], Future]] = deque()
        for batch in batches:
            if len(under_way) >= 2 * len(self._all):
                yield _answered(*under_way.popleft())
            under_way.append((batch, self._threads.submit(self._encode, batch)))
        while under_way:
            yield _answered(*under_way.popleft())

    def _encode(self, batch: list[Unit]) -> Any:
        worker = self._idle.get()
        try:
            worker.send(batch)
            return worker.receive()
        finally:
            self._idle.put(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.end()
        self._threads.shutdown(wait=True)


class InProcess:
    """Encoder in this process, with the interface of Workers: for a few documents."""

    def __init__(self, spec: EncoderSpec) -> None:
        self._encoder = Encoder(spec)

    def encode(self, batches: Iterable[list[Unit]]) -> Iterator[tuple[list[Unit], Any]]:
        """As Workers.encode."""
        for batch in batches:
            yield _with_problems(batch, *self._encoder.answer(batch))


def _answered(units: list[Unit], future: Future) -> tuple[list[Unit], Any]:
    return _with_problems(units, *future.result())


def _with_problems(
    units: list[Unit], problems: dict[int, str], encoded: Any
) -> tuple[list[Unit], Any]:
    if problems:
        units = [replace(u, problem=problems.get(i, u.problem)) for i, u in enumerate(units)]
    return units, encoded


class _Worker:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from megadistill.data.workers import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                # As many processes as cores: threads within them would only be in each other's way.
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_NUM_THREADS": "1",
            },
        )
        self._requests: Any = self.process.stdin
        self._answers: Any = self.process.stdout

    def send(self, value: Any) -> None:
        try:
            pickle.dump(value, self._requests, protocol=pickle.HIGHEST_PROTOCOL)
            self._requests.flush()
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Any:
        try:
            value = pickle.load(self._answers)  # noqa: S301
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._died() from error
        if isinstance(value, Exception):
            raise value
        return value

    def _died(self) -> DataError:
        code = self.process.wait()
        return DataError(
            f"a tokenising process ended with exit code {code}"
            + (": out of memory? Set data.workers to fewer" if code == -signal.SIGKILL else "")
        )

    def end(self) -> None:
        # Killed, not asked: it may be in the middle of a batch that nobody waits for, and it holds
        # nothing that could be lost.
        self.process.kill()
        self.process.wait()
        for pipe in (self._requests, self._answers):
            with suppress(OSError):  # closing flushes what the process will not read any more
                pipe.close()


def serve() -> None:
    """Runs a tokenising process until its input ends."""
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach the parent, which ends us
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    requests = sys.stdin.buffer
    encoder = None
    while True:
        try:
            request = pickle.load(requests)  # noqa: S301
        except (EOFError, pickle.UnpicklingError):
            return  # the parent is gone, or was killed in mid-sentence
        answer: Any = None
        try:
            if encoder is None:
                encoder = Encoder(request)
            else:
                answer = encoder.answer(request)
        except Exception as error:  # noqa: BLE001 - raised again in the parent
            answer = error
        try:
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:
            return
