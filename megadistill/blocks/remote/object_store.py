"""A folder at a URL, through fsspec: file, sftp, s3, gs, hf and whatever else it knows.

The seam between stores and the network, as `files` is the one to the local file system. Every
fault of a backend becomes one of our errors, with the place but without what a URL may hold of
credentials; network faults are tried again after 0.5, 1, 2 and 4 seconds. Options of a backend,
keys among them, are fsspec's own: its configuration files, `FSSPEC_SFTP_KEY_FILENAME=...`, or the
places where each backend looks for credentials.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from megadistill.errors import CorruptBlockError, MegadistillError, StoreError
from megadistill.storage.disk import is_url

log = logging.getLogger(__name__)

PAUSES_S = (0.5, 1.0, 2.0, 4.0)

_PACKAGES = {
    "abfs": "adlfs",
    "az": "adlfs",
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
# Trying again does not help: what is asked for is not allowed, or the local disk is full.
_FINAL = (PermissionError, NotImplementedError, NotADirectoryError, TypeError, ValueError)
_FINAL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EISDIR)
_FINAL_NAMES = re.compile("Authentication|Credential|PasswordRequired")

Result = TypeVar("Result")


class Remote:
    """The folder at `url`. Safe to use from several threads. All but `find` raise StoreError."""

    def __init__(self, url: str) -> None:
        self.name = shown(url)
        self._url, self._secrets = url, _secrets(url)
        self._idle: deque[Any] = deque()
        self._require_backend()
        self._root = str(self._tried("reach", "", lambda fs: fs._strip_protocol(url))).rstrip("/")

    def find(self, name: str, *, limit: int) -> bytes | None:
        """The bytes of an object; None where there is none. CorruptBlockError above `limit`."""
        path = self._path(name)
        try:
            data = self._tried("read", name, lambda fs: fs.cat_file(path, start=0, end=limit + 1))
        except FileNotFoundError:
            return None
        if len(data) > limit:
            raise CorruptBlockError(self.place(name), f"at most {limit} bytes", "more")
        return data

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none."""
        path = self._path(name)
        try:
            return int(self._tried("look at", name, lambda fs: fs.info(path))["size"])
        except FileNotFoundError:
            return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The objects directly in a folder of the store, name to bytes; none where it is absent."""
        path = self._path(folder)

        def listing(fs: Any) -> list[dict[str, Any]]:
            fs.invalidate_cache()
            return fs.ls(path, detail=True)

        try:
            found = self._tried("list", folder, listing)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {
            str(entry["name"]).rstrip("/").rpartition("/")[2]: int(entry["size"])
            for entry in found
            if entry["type"] == "file"
        }

    def download(self, name: str, target: Path) -> None:
        """Write an object's bytes to a local file. FileNotFoundError where there is none."""
        path = self._path(name)
        self._tried("download", name, lambda fs: fs.get_file(path, str(target)))

    def upload(self, source: Path, name: str) -> None:
        """Make an object of a local file."""
        path = self._path(name)
        self._tried("write", name, lambda fs: fs.put_file(str(source), path))

    def write(self, name: str, data: bytes) -> None:
        """Make an object of `data`."""
        path = self._path(name)
        self._tried("write", name, lambda fs: fs.pipe_file(path, data))

    def remove(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError):
            self._tried("remove", name, lambda fs: fs.rm_file(path))

    def make_folder(self, name: str = "") -> None:
        """Make a folder, where the place knows folders."""
        path = self._path(name)
        self._tried("write", name, lambda fs: fs.makedirs(path, exist_ok=True))

    def place(self, name: str) -> str:
        """An object as messages name it."""
        return f"{self.name}/{name}" if name else self.name

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _require_backend(self) -> None:
        from fsspec import get_filesystem_class
        from fsspec.registry import known_implementations

        protocol = self._url.partition("://")[0]
        try:
            get_filesystem_class(protocol)
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            said = known_implementations.get(protocol, {}).get("err", str(error))
            hint = f"run `pip install {package}`" if package else said
            raise StoreError(
                f"{self.name}: {protocol}:// needs a package that is not installed: {hint}"
            ) from None
        except ValueError:
            raise StoreError(
                f"{self.name}: {protocol}:// is not known, expected file, sftp, s3, gs, hf or "
                "another protocol of fsspec"
            ) from None

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Any]:
        """A file system of fsspec for one thread; not used again after a fault.

        sftp's answers reach the wrong thread, and hang, where two threads share a connection.
        """
        from fsspec.core import url_to_fs

        try:
            fs = self._idle.pop()
        except IndexError:
            fs, _ = url_to_fs(self._url, skip_instance_cache=True)
        try:
            yield fs
        except FileNotFoundError:
            self._idle.append(fs)
            raise
        self._idle.append(fs)

    def _tried(self, action: str, name: str, call: Callable[[Any], Result]) -> Result:
        """call(connection), again after a pause where the network failed; StoreError in the end."""
        for pause in (*PAUSES_S, None):
            try:
                with self._connection() as fs:
                    return call(fs)
            except (FileNotFoundError, MegadistillError):
                raise
            except Exception as error:  # noqa: BLE001 - every backend has errors of its own
                said = self._said(error)
                final = _is_final(error)
            if final or pause is None:
                # No cause: it may hold what was taken out of the message.
                raise StoreError(f"{self.place(name)}: cannot {action}: {said}") from None
            log.info("%s: %s: trying again in %s s", self.place(name), said, pause)
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _said(self, error: Exception) -> str:
        """Returns a backend's error in one line, without credentials."""
        text = " ".join(str(error).split())
        for secret in self._secrets:
            text = text.replace(secret, "...")
        text = re.sub(r"//[^/@\s]+@", "//", text)
        text = re.sub(r"\?[^\s'\"]+", "?...", text)  # signed URLs
        return f"{type(error).__name__}: {text}"[:300]


def shown(url: str) -> str:
    """`url` without user, password and query: as it may stand in messages and files."""
    if not is_url(url):
        return url
    protocol, _, rest = url.partition("://")
    rest = rest.partition("?")[0].partition("#")[0]
    host, slash, path = rest.partition("/")
    # hf://datasets/owner/name@revision/...: there the @ stands in the path.
    return f"{protocol}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")


def read_only(url: str) -> StoreError:
    """Returns the error for writing a remote store in place."""
    return StoreError(
        f"{shown(url)}: a remote store cannot be written in place: write it to a local folder, "
        "then copy it with tools/copy_cache.py"
    )


def _is_final(error: Exception) -> bool:
    return (
        isinstance(error, _FINAL)
        or getattr(error, "errno", None) in _FINAL_NUMBERS
        or bool(_FINAL_NAMES.search(type(error).__name__))
    )


def _secrets(url: str) -> list[str]:
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    found = [parts.query, user, user.partition(":")[2]]
    return sorted((s for s in found if len(s) > 2), key=len, reverse=True)
