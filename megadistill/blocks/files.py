"""The seam to the file system: the few operations a block store is made of.

Everything a store changes on disk goes through `Files`, so that tests can record the operations,
stop after any of them, and look at what a crash would have left. Reading goes through
`read_file`, which follows no link and waits on no pipe: a store may come from anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from megadistill.errors import CorruptBlockError, StoreError


@contextlib.contextmanager
def _told(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError into one line that says what could not be done, and where."""
    try:
        yield
    except OSError as error:
        hint = ": free some space and run again" if error.errno == errno.ENOSPC else ""
        raise StoreError(f"{path}: cannot {action}: {error.strerror or error}{hint}") from error


class Files:
    """Changes to the local file system. Nothing is durable before its fsync.

    A new file's bytes need `fsync`; its name, and a rename or removal, need `fsync_dir` of the
    directory it stands in. All raise StoreError.
    """

    def write_new(self, path: Path, data: bytes) -> None:
        """Write a file that must not exist yet."""
        with _told("write", path), path.open("xb") as file:
            file.write(data)

    def fsync(self, path: Path) -> None:
        """Wait until the file's bytes are on the disk, whoever wrote them."""
        self._fsync(path, os.O_RDONLY)

    def fsync_dir(self, path: Path) -> None:
        """Wait until the directory's names are on the disk."""
        self._fsync(path, os.O_RDONLY | os.O_DIRECTORY)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, atomically taking the place of `target` if there is one."""
        with _told("put in place", target):
            os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name where the file system can, else copy it."""
        with _told("copy", target):
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOSPC):
                    raise
                shutil.copyfile(source, target, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        """Remove a file; one that is not there is no error."""
        with _told("remove", path):
            path.unlink(missing_ok=True)

    def mkdir(self, path: Path) -> None:
        """Make a directory and its parents, each durably."""
        with _told("make the directory", path):
            if path.is_dir():
                return
            self.mkdir(path.parent)
            path.mkdir(exist_ok=True)
        self.fsync_dir(path.parent)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory of temporary files, as far as it goes."""
        shutil.rmtree(path, ignore_errors=True)

    def _fsync(self, path: Path, flags: int) -> None:
        with _told("write to disk", path):
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


def read_file(path: Path, *, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises FileNotFoundError, CorruptBlockError, StoreError as `open_regular` does.
    """
    handle, size = open_regular(path)
    with os.fdopen(handle, "rb") as file, _told("read", path):
        if size > limit:
            raise CorruptBlockError(str(path), f"at most {limit} bytes", f"{size} bytes")
        return file.read(limit)
