"""Free disk space while a cache is generated: below the reserve, all ranks stop cleanly.

A disk that runs full under a store of weeks fails every writer on it. So after each commit the
rank that committed asks how much is free (one statvfs), and compares with what is still to come, by
the bytes that this run's blocks have taken so far: it stops where less than `cache.reserve` of that
is free (a half), or less than `cache.min_free`. The error is left in the process group's store, and
every rank looks there before it begins another block, so no rank is left in a collective. At most
two blocks a group are committed after that, the one in hand and the one being written.

A writer that fails (the disk is full all the same, an I/O error) stops all ranks the same way.

A cache is one folder that every rank sees. Where hosts mount it from disks of their own, each
compares its disk with the whole rest, which errs on the side of stopping.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megadistill.blocks import BlockReader
from megadistill.config import CacheConfig
from megadistill.errors import MegadistillError, StoreError
from megadistill.parallel import Mesh
from megadistill.storage.disk import free_bytes, readable_bytes

log = logging.getLogger(__name__)

# Blocks and bytes are one counter: read or added to apart, the bytes may be those of more blocks
# than are counted. 63 bits hold a million blocks and 128 TiB, in units of 16 bytes.
_A_BLOCK, _UNIT = 1 << 43, 16

FreeBytes = Callable[[Path], int]


class DiskGuard:
    """Counts the durable blocks of all ranks, and stops the ranks together. One per run and rank.

    run         a number that this run alone has, equal on all ranks
    missing     blocks to do
    free_bytes  asks the disk; tests fill one by it
    """

    def __init__(
        self,
        mesh: Mesh,
        store: BlockReader,
        config: CacheConfig,
        *,
        run: int,
        missing: int,
        free_bytes: FreeBytes = free_bytes,
    ) -> None:
        self._mesh, self._store, self._config = mesh, store, config
        self._missing, self._free_bytes = missing, free_bytes
        self._durable, self._error = (f"megadistill/{name}/{run}" for name in ("durable", "error"))
        self._asking = threading.Lock()

    def committed(self, block: int) -> None:
        """Counts a durable block; asks all ranks to stop if the disk is too full to continue."""
        size = block_bytes(self._store, block)
        blocks, total = _both(self._mesh.store.add(self._durable, _A_BLOCK + -(-size // _UNIT)))
        error = self._too_little(to_come=total * (self._missing - blocks) // blocks)
        if error is not None:
            self.ask_to_stop(error)

    def durable(self) -> tuple[int, int]:
        """Returns (blocks, bytes) that this run has made durable so far, on all ranks."""
        return _both(self._mesh.store.add(self._durable, 0))

    def ask_to_stop(self, error: BaseException) -> None:
        """Asks all ranks to stop before their next block, with the reason. Safe from any thread."""
        if isinstance(error, dist.DistError):
            return  # rank 0 is gone, and with it whom to tell: the watchdog stops us
        if not isinstance(error, MegadistillError):
            error = self._told(error)
        error.common = True
        with self._asking, contextlib.suppress(dist.DistError):
            if not self.asked_to_stop():
                self._mesh.store.set(self._error, pickle.dumps(error))  # type: ignore[arg-type]

    def asked_to_stop(self) -> bool:
        """Whether any rank asked. Not collective: ranks may see it one block apart."""
        return self._mesh.store.check([self._error])

    def raise_if_stopped(self) -> None:
        """Raises the error, if any, on all ranks, after a barrier behind their last commit."""
        if self.asked_to_stop():
            error = pickle.loads(self._mesh.store.get(self._error))  # noqa: S301 - a rank's own
            error.common = True
            raise error

    def _told(self, error: BaseException) -> StoreError:
        if not isinstance(error, OSError):
            log.error("writing a block failed", exc_info=error)  # a bug: its traceback is needed
            return StoreError(f"{self._store.path}: {type(error).__name__}: {error}")
        where, why = error.filename or self._store.path, error.strerror or str(error)
        way_out = "free some space" if error.errno == errno.ENOSPC else "repair the disk"
        return StoreError(f"{where}: cannot write: {why}: {way_out} and run again")

    def _too_little(self, *, to_come: int) -> StoreError | None:
        if not to_come:
            return None
        free = self._free_bytes(self._store.path)
        floor, share = round(self._config.min_free * 2**30), self._config.reserve
        if free >= floor and free >= share * to_come:
            return None
        below, setting = (
            (f"cache.min_free ({readable_bytes(floor)})", "cache.min_free=0")
            if free < floor
            else (f"{share:g} of that, cache.reserve", "cache.reserve=0")
        )
        return StoreError(
            f"{self._store.path}: stopped, its disk has {readable_bytes(free)} free and "
            f"{readable_bytes(to_come)} are still to come, expected at least {below}: free "
            f"{readable_bytes(to_come + floor - free)} more and run again, or set {setting}"
        )


def _both(counter: int) -> tuple[int, int]:
    """Returns (blocks, bytes) of the counter."""
    blocks, units = divmod(counter, _A_BLOCK)
    return blocks, units * _UNIT


def block_bytes(store: BlockReader, block: int) -> int:
    """Returns the bytes that a committed block takes on disk: its shard and its marker."""
    return sum(p.stat().st_size for p in (store.layout.shard(block), store.layout.marker(block)))
