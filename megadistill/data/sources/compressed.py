"""Opens a file as a stream of bytes. The ending of its name says how it is compressed.

Streams decompress as they are read, so a file of any size takes a few MiB of memory.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megadistill.errors import BadDocumentError

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# Raised by the decompressors for damaged or truncated data, and by the operating system.
ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)
# How files begin that are not plain text.
_MAGIC = {
    b"\x1f\x8b": "gzip data, expected a name that ends in .gz",
    b"BZh91AY": "bzip2 data, expected a name that ends in .bz2",
    b"\xfd7zXZ\x00": "xz data, expected a name that ends in .xz",
    b"\x28\xb5\x2f\xfd": "zstd data, expected a name that ends in .zst",
    b"version https://git-lfs": "a pointer of Git LFS, expected the file: fetch it (git lfs pull)",
    b"PK\x03\x04": "a zip archive, expected a plain file: unpack it",
    b"\xff\xfe\x00\x00": "UTF-32 text, expected UTF-8: convert it (iconv -f UTF-32 -t UTF-8)",
    b"\x00\x00\xfe\xff": "UTF-32 text, expected UTF-8: convert it (iconv -f UTF-32 -t UTF-8)",
    b"\xff\xfe": "UTF-16 text, expected UTF-8: convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 text, expected UTF-8: convert it (iconv -f UTF-16 -t UTF-8)",
}
TOO_LONG = "longer than data.max_document_mib: raise it if the document is right"
_BOM = b"\xef\xbb\xbf"
_LOOK = 32  # bytes at the beginning of a file that are looked at
_CHUNK = 1 << 18  # compressed bytes that are read at a time


def plain_name(path: str) -> str:
    """The name without the ending of a compression."""
    return path[: -len(Path(path).suffix)] if is_compressed(path) else path


def is_compressed(path: str) -> bool:
    """Whether the name ends as a compressed file's."""
    return Path(path).suffix.lower() in SUFFIXES


def open_bytes(path: str) -> io.BufferedReader:
    """The decompressed content of a text or json file, without a leading byte order mark.

    BadDocumentError: the content is no UTF-8 text by its first bytes. ERRORS: it cannot be read.
    """
    stream = io.BufferedReader(_open(path), 1 << 18)
    try:
        start = stream.peek(_LOOK)[:_LOOK]
        for magic, found in _MAGIC.items():
            if start.startswith(magic):
                raise BadDocumentError(f"found {found}")
        if (order := _utf16_order(start)) is not None:
            raise BadDocumentError(
                f"found UTF-16 text, expected UTF-8: convert it (iconv -f UTF-16{order} -t UTF-8)"
            )
        if start.startswith(_BOM):
            stream.read(len(_BOM))
    except BaseException:
        stream.close()
        raise
    return stream


def _utf16_order(start: bytes) -> str | None:
    """LE or BE if every second byte is NUL, as in UTF-16 text of Latin letters without a mark."""
    if len(start) < 4:
        return None
    zero = [not any(start[first::2]) for first in (0, 1)]
    return {(True, False): "BE", (False, True): "LE"}.get((zero[0], zero[1]))


def _open(path: str) -> Any:
    match Path(path).suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".bz2":
            return _Members(path, bz2.BZ2Decompressor)
        case ".xz":
            return _Members(path, lzma.LZMADecompressor)
        case ".zst":
            return _Zstd(path)
    return open(path, "rb", buffering=0)


class _Members(io.RawIOBase):
    """Reads the members of a bz2 or xz file, one after the other.

    Bytes behind a member that begin no other are an error: `bz2.open` and `lzma.open` end there in
    silence, so one damaged byte in a file of many members would drop all that follows. Zeros are
    padding.
    """

    def __init__(self, path: str, decompressor: Callable[[], Any]) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._new = decompressor
        self._decompressor = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if not self._decompressor.eof:
                data = self._file.read(_CHUNK) if self._decompressor.needs_input else b""
                if not data and self._decompressor.needs_input:
                    raise EOFError("it ends in the middle of a compressed member")
            else:
                data = self._decompressor.unused_data.lstrip(b"\0")
                while not data and (more := self._file.read(_CHUNK)):
                    data = more.lstrip(b"\0")
                if not data:
                    return 0
                self._decompressor = self._new()
            if plain := self._decompressor.decompress(data, len(buffer)):
                buffer[: len(plain)] = plain
                return len(plain)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Zstd(io.RawIOBase):
    """Reads the zstd frames of a file with Arrow's decoder, which every `datasets` brings."""

    def __init__(self, path: str) -> None:
        import pyarrow

        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._stream = pyarrow.CompressedInputStream(self._file, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._file.close()
        super().close()


def reason(error: BaseException) -> str:
    """The first line of an error, without the path that the operating system repeats."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return lines[0] if lines and lines[0] else type(error).__name__


def shown(path: str) -> str:
    """`path` on one line: characters that do not print are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)
