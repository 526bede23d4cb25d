"""Ranks forked from a warm server: processes that may be killed, and cost a tenth of a second.

The server has imported torch, DeepSpeed and transformers and started no thread. Unlike the pool of
tests/ranks.py, each call gets new processes, which go all the way from joining the process group to
their exit code.
"""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.ports import free_port


class Ranks:
    """`world` processes that run `function` ("package.module:name") with these arguments.

    What rank r says stands in folder/rank-r.log. Use as a context manager: none outlives it.
    """

    def __init__(self, world: int, function: str, *arguments: Any, folder: Path) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.forked_preload"])
        port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(world)]
        self.processes = [
            context.Process(target=_run, args=(function, arguments, rank, world, port, str(log)))
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    @property
    def codes(self) -> list[int | None]:
        """Exit codes as `Process.exitcode` has them: None while alive, -9 after kill -9."""
        return [process.exitcode for process in self.processes]

    def wait(self, seconds: float) -> list[int | None]:
        """The exit codes when all have ended, or after so many seconds."""
        sentinels = {process.sentinel for process in self.processes}
        end = time.monotonic() + seconds
        while sentinels and (left := end - time.monotonic()) > 0:
            sentinels -= set(mp.connection.wait(list(sentinels), timeout=left))
        return self.codes

    def said(self) -> str:
        return "".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs if log.exists())

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _run(
    function: str, arguments: tuple[Any, ...], rank: int, world: int, port: int, log: str
) -> None:
    # As a terminal starts a program; a shell starts jobs in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    module, name = function.split(":")
    raise SystemExit(getattr(importlib.import_module(module), name)(*arguments))
