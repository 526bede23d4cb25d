"""A bounded folder of local copies of remote shards, shared by the ranks of a host.

All mirrors in one folder share its limit: the shards that were opened longest ago are removed
first, and one that is in use is never removed: who has it open holds a shared lock on the file. So
the limit may be exceeded by what is being read or downloaded at one time, until the next download.
The kernel lets go of a lock when its process dies, so that nothing is left behind to clean up.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

DEFAULT_LIMIT = 50 << 30


def default_folder() -> Path:
    """Default folder of local copies."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megadistill"


@dataclass(frozen=True)
class LocalCopies:
    """A folder for the shards of remote stores, and the bytes that all of them may take."""

    path: Path
    limit: int = DEFAULT_LIMIT

    def mirror(self, name: str, header: bytes) -> Path:
        """Where a store is mirrored. Another store that takes its URL gets another folder."""
        tail = name.rpartition("/")[2]
        return self.path / f"{tail}-{xxhash.xxh3_64_hexdigest(name.encode() + header)}"

    def make_room(self, size: int) -> None:
        """Remove the shards opened longest ago, so that one of `size` bytes fits the limit."""
        with locked(self.path / "evict.lock"):
            shards = []
            for path in [*self.path.glob("*/shard.*.mds"), *self.path.glob("*.run/*.part")]:
                with suppress(FileNotFoundError):
                    status = path.stat()
                    shards.append((status.st_atime_ns, status.st_size, path))
            excess = sum(s for _, s, _ in shards) + size - self.limit
            for _, bytes_, path in sorted(shards):
                if excess <= 0:
                    return
                if _removed_unless_used(path):
                    excess -= bytes_


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock. The kernel lets go of it when the process dies."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def shared(path: Path) -> int | None:
    """A descriptor with a shared lock on the file, which is young again; None where it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(handle, fcntl.LOCK_SH)
    try:
        status = os.fstat(handle)
        if os.stat(path).st_ino == status.st_ino:
            # Not the time of change, by which it is known that a file has been checked.
            os.utime(handle, ns=(time.time_ns(), status.st_mtime_ns))
            return handle
    except FileNotFoundError:
        pass
    os.close(handle)
    return None


def _removed_unless_used(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def file_xxh3(path: Path) -> int | None:
    """The checksum of a file of any size; None where there is none."""
    digest = xxhash.xxh3_64()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    except FileNotFoundError:
        return None
    return digest.intdigest()
