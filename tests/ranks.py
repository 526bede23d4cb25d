"""Warm ranks: processes that have imported torch and DeepSpeed once and stand in a process group.

A start through DeepSpeed's launcher takes 15 s; a call on warm ranks takes milliseconds. One pool a
world size, started on first use, kept until pytest ends.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing as mp
import os
import traceback
from typing import Any

from tests.ports import free_port

_POOLS: dict[int, RankPool] = {}


def run_ranks(world: int, function: str, *, tp: int = 1, **arguments: Any) -> list[Any]:
    """`function` ("package.module:name") as function(mesh, **arguments) on `world` ranks.

    Returns what each rank returned. An exception of any rank is raised here with its traceback.
    """
    if world not in _POOLS:
        _POOLS[world] = RankPool(world)
    try:
        return _POOLS[world].run(function, tp, arguments)
    except BaseException:
        # After a failure the ranks may stand in different places: never reuse them.
        _POOLS.pop(world).close()
        raise


class RankPool:
    def __init__(self, world: int) -> None:
        port = free_port()
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world, port), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        atexit.register(self.close)

    def run(self, function: str, tp: int, arguments: dict[str, Any]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, tp, arguments))
        waiting = dict(enumerate(self.pipes))
        results: list[Any] = [None] * len(self.pipes)
        while waiting:
            ready = mp.connection.wait(list(waiting.values()), timeout=300)
            if not ready:
                raise TimeoutError(f"{function}: rank(s) {sorted(waiting)} said nothing for 300 s")
            for rank, pipe in list(waiting.items()):
                if pipe in ready:
                    try:
                        ok, results[rank] = pipe.recv()
                    except EOFError:
                        raise RuntimeError(f"{function}: rank {rank} died") from None
                    if not ok:
                        raise RankError(f"rank {rank}: {results[rank]}")
                    del waiting[rank]
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


class RankError(AssertionError):
    """A rank raised; the message ends with its traceback."""


def _serve(pipe: Any, rank: int, world: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    from megadistill import parallel

    torch.set_num_threads(1)
    meshes: dict[int, parallel.Mesh] = {}
    while True:
        try:
            function, tp, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if tp not in meshes:
                meshes[tp] = parallel.start(tp=tp)
            module, name = function.split(":")
            result = getattr(importlib.import_module(module), name)(meshes[tp], **arguments)
            pipe.send((True, result))
        except BaseException:  # noqa: BLE001 - whatever it was, the caller must see it
            pipe.send((False, traceback.format_exc()))
