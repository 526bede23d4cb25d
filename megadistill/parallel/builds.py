"""Operators that are compiled at first use, and the locks that a killed build leaves.

torch compiles an extension (DeepSpeed's operators are such) in a folder of its own and marks the
build by a file named `lock` there. A process that is killed leaves the file, and torch's
`FileBaton` waits for it forever, in every later start, without a message.

A builder keeps its lock file open, so `/proc` tells whether one is alive. `install` teaches the
baton to look: the lock of a process that is gone is removed and the build done again, once the
compilers that the process has left behind have ended. Where that cannot be known (a folder that
other hosts share, a lock of another user), the start logs within 10 s which file it waits for, and
what to do.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SAY_AFTER_S, SAY_AGAIN_S = 10.0, 60.0
_POLL_S = 0.2
# File systems of one host. On any other, the builder may be a process of another host.
_LOCAL = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
# The kernel's first process namespace. In a container, /proc does not show the processes of others,
# which may share all folders but those of the container's own overlay.
_ALL_PROCESSES = "pid:[4026531836]"

_COMPILERS = (
    "ninja",
    "sh",
    "c++",
    "g++",
    "gcc",
    "cc1",
    "as",
    "ld",
    "collect2",
    "clang",
    "nvcc",
    "cudafe++",
    "cicc",
    "ptxas",
    "fatbinary",
    "hipcc",
)


def install() -> None:
    """Makes torch's `FileBaton` look for the holder of its lock. Idempotent."""
    from torch.utils.file_baton import FileBaton

    if FileBaton.try_acquire is not _try_acquire:
        global _create
        _create = FileBaton.try_acquire
        FileBaton.try_acquire = _try_acquire  # type: ignore[method-assign, assignment]


_create: Any = None  # torch's own: makes the lock file, or returns False


def _try_acquire(baton: Any) -> bool:
    """True where this process is to build, False when another one has built.

    Takes the place of `FileBaton.try_acquire`, and waits where torch would wait afterwards.
    """
    path, began = Path(baton.lock_file_path), time.monotonic()
    waited, said_at, abandoned = False, began + SAY_AFTER_S - SAY_AGAIN_S, None
    while True:
        with _guarded(path):
            if waited and not path.exists():
                return False  # released: it is built
            if _create(baton):
                return True
            holders, held = _holders(path)
            # At two looks: a builder closes the file a moment before it removes it.
            if held is not None and held == abandoned:
                log.warning("%s: the process that built here is gone: building again", path)
                path.unlink()
                return bool(_create(baton))
            abandoned = held
        now = time.monotonic()
        if now > said_at + SAY_AGAIN_S:
            said_at = now
            _say(path, holders)
        waited = True
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Lets one process at a time decide about a lock; the kernel frees the guard of a dead one."""
    try:
        guard = os.open(path.with_name("lock.guard"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # torch's own attempt will say why
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield
    finally:
        os.close(guard)


def _holders(path: Path) -> tuple[list[int], int | None]:
    """Returns the processes that hold the lock or compile there; its inode if surely none does."""
    found: list[int] = []
    try:
        status, folder = path.stat(), path.parent.stat()
    except FileNotFoundError:  # released in this moment
        return found, None
    kind = _file_system(path.parent)
    private = kind == "overlay" or (kind in _LOCAL and _link("/proc/self/ns/pid") == _ALL_PROCESSES)
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        process = Path("/proc", name)
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            compiles = _is(process / "cwd", folder) and _is_compiler(process)
            if compiles or any(_is(fd, status) for fd in (process / "fd").iterdir()):
                found.append(int(name))
    nobody = private and status.st_uid == os.getuid() and not found
    return found, status.st_ino if nobody else None


def _is(path: Path, status: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), status)
    return False


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _is_compiler(process: Path) -> bool:
    return (process / "comm").read_text().startswith(_COMPILERS)


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on; "" where that cannot be known."""
    best, kind, real = "", "", str(folder.resolve())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, found, *_ = line.split(" ")
            mount = mount.replace("\\040", " ")
            inside = mount == "/" or real == mount or real.startswith(f"{mount}/")
            if inside and len(mount) >= len(best):
                best, kind = mount, found
    return kind


def _say(path: Path, holders: list[int]) -> None:
    operator = path.parent.name
    if holders:
        log.info(
            "%s: process %d is building the operator %s: waiting for it", path, holders[0], operator
        )
    else:
        log.warning(
            "%s: waiting for the build of the operator %s. No process of this host builds it. "
            "Unless another host or user does, the build was killed: remove the file (rm %s)",
            path,
            operator,
            path,
        )
