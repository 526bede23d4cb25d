"""The seam to the file system: the few operations a block store is made of.

Everything a store changes on disk goes through `Files`, so that tests can record the operations,
stop after any of them, and look at what a crash would have left; only streaming's writer of shards
goes past it, into a temporary folder. Reading goes through `open_regular`, which follows no link
and waits on no pipe, because a store may come from anywhere; and through `read_at` rather than a
memory map, because a map of a file that somebody cuts, or of a disk that fails, kills the process
where a read gives an error (a sample costs 1 microsecond more).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import xxhash

from megadistill.errors import CorruptBlockError, StoreError

_CHUNK = 1 << 20  # fits a core's cache: hashing it costs no second trip to memory
_FULL, _DENIED = ": free some space and run again", ": make it writable and run again"
_HINTS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: _DENIED,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
}
# What a file system says that has no second names, or none for this file.
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def named_os_errors(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError into one line: the failed operation, the file, and what to do."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "")
        raise StoreError(f"{path}: cannot {action}: {error.strerror or error}{hint}") from error


class Files:
    """Changes to the local file system. Nothing is durable before its fsync.

    A new file's bytes need `fsync`; its name, and a rename or removal, need `fsync_dir` of the
    directory it stands in. All raise StoreError.
    """

    def write_new(self, path: Path, data: bytes | memoryview) -> None:
        """Write a file that must not exist yet."""
        with named_os_errors("write", path):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(handle, left) :]  # a nearly full disk takes a part
            finally:
                os.close(handle)

    def allocate(self, path: Path, size: int) -> None:
        """Make a file of so many bytes that must not exist yet, and take the room for them."""
        with named_os_errors("write", path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.posix_fallocate(handle, 0, size)
            finally:
                os.close(handle)

    def fsync(self, path: Path) -> None:
        """Wait until the file's bytes are on the disk, whoever wrote them."""
        self._fsync(path, os.O_RDONLY)

    def fsync_dir(self, path: Path) -> None:
        """Wait until the directory's names are on the disk."""
        self._fsync(path, os.O_RDONLY | os.O_DIRECTORY)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, atomically taking the place of `target` if there is one."""
        with named_os_errors("put in place", target):
            os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name where the file system can, else copy it."""
        with named_os_errors("copy", target):
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                shutil.copyfile(source, target, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        """Remove a file; one that is not there is no error."""
        with named_os_errors("remove", path), contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Make a directory and its parents, each durably."""
        with named_os_errors("make the directory", path):
            if path.is_dir():
                return
            self.mkdir(path.parent)
            with contextlib.suppress(FileExistsError):  # made since, by another rank
                os.mkdir(path)
        self.fsync_dir(path.parent)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory of temporary files, as far as it goes."""
        shutil.rmtree(path, ignore_errors=True)

    def _fsync(self, path: Path, flags: int) -> None:
        with named_os_errors("write to disk", path):
            handle = os.open(path, flags)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


LOCAL = Files()


def open_regular(path: Path) -> tuple[int, int]:
    """(file descriptor, size in bytes) of a regular file, opened for reading.

    Raises FileNotFoundError as it is, CorruptBlockError for a link, directory, pipe or device,
    StoreError where the file cannot be opened.
    """
    try:
        # O_NONBLOCK: opening a pipe somebody left in the directory must not wait for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptBlockError(str(path), "a regular file", "a link") from error
        raise StoreError(f"{path}: cannot read: {error.strerror}") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise CorruptBlockError(str(path), "a regular file", "another kind of file")
    return handle, status.st_size


def names_in(path: Path) -> list[str]:
    """The names in a directory. StoreError where it cannot be listed."""
    with named_os_errors("list", path):
        return os.listdir(path)


def read_at(handle: int, path: Path, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop` of an open file; fewer where the file is shorter."""
    parts = []
    with named_os_errors("read", path):
        while start < stop and (part := os.pread(handle, min(stop - start, _CHUNK), start)):
            parts.append(part)
            start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def xxh3_of(handle: int, path: Path) -> int:
    """The xxh3_64 of a whole open file, in chunks: a shard may be 4 GiB."""
    digest, at = xxhash.xxh3_64(), 0
    while part := read_at(handle, path, at, at + _CHUNK):
        digest.update(part)
        at += len(part)
    return digest.intdigest()


def read_file(path: Path, *, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises FileNotFoundError, CorruptBlockError, StoreError as `open_regular` does.
    """
    handle, size = open_regular(path)
    with os.fdopen(handle, "rb") as file, named_os_errors("read", path):
        if size > limit:
            raise CorruptBlockError(str(path), f"at most {limit} bytes", f"{size} bytes")
        return file.read(size)  # a limit may be what a damaged file claims, and far too large
