"""Every JSON of a store: canonical bytes that end with the xxh3 of what precedes them.

The bytes are one JSON object with sorted keys, no spaces and plain ASCII; its last member is
"xxh3", the xxh3_64 of every byte before the comma in front of it. So a file is still JSON to any
reader, equal content is equal bytes, and a damaged byte is found before the file is believed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from megadistill.errors import CorruptBlockError
from megadistill.storage.files import Files, read_file

_DEPTH = 32  # recipes are compared recursively; the interpreter's own limit is no error of ours
_TAIL = len(',"xxh3":"0123456789abcdef"}\n')


def hex64(value: int) -> str:
    """A 64-bit checksum as it is written in JSON: 16 hexadecimal digits."""
    return f"{value:016x}"


def is_hex64(value: object) -> bool:
    """Whether `value` is what `hex64` writes."""
    return isinstance(value, str) and len(value) == 16 and set(value) <= set("0123456789abcdef")


def encode_json(record: dict[str, Any]) -> bytes:
    """Canonical bytes of `record`, ending with their checksum."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    if len(text) == 2 or "xxh3" in record:
        raise ValueError("a record needs a member, and none of its own called xxh3")
    body = text[:-1].encode("ascii")
    return body + f',"xxh3":"{hex64(xxhash.xxh3_64_intdigest(body))}"}}\n'.encode("ascii")


def decode_json(data: bytes, *, file: str) -> dict[str, Any]:
    """The record that `encode_json` wrote. CorruptBlockError where the bytes are not canonical."""
    body, tail = data[:-_TAIL], data[-_TAIL:]
    expected = f',"xxh3":"{hex64(xxhash.xxh3_64_intdigest(body))}"}}\n'.encode("ascii")
    if tail != expected:
        raise CorruptBlockError(file, f"to end with {expected[1:-2].decode()}", _shown(tail))
    try:
        record = json.loads(body + b"}")
        if _deeper(record, _DEPTH):
            raise CorruptBlockError(file, f"at most {_DEPTH} levels of JSON", "more")
        canonical = encode_json(record)
    except (ValueError, TypeError, RecursionError, AttributeError) as error:
        raise CorruptBlockError(file, "a JSON object", type(error).__name__) from error
    if canonical != data:
        raise CorruptBlockError(file, "sorted keys without spaces", "another way of writing them")
    return record


def read_json(path: Path, *, limit: int = 1 << 26) -> dict[str, Any]:
    """The record in a file. FileNotFoundError, or CorruptBlockError."""
    return decode_json(read_file(path, limit=limit), file=str(path))


def put_file(files: Files, target: Path, data: bytes, *, temporary: Path) -> None:
    """Write `target` whole and durably, or leave it as it was.

    `temporary` is a name in an existing directory of the same file system.
    """
    files.write_new(temporary, data)
    files.fsync(temporary)
    files.replace(temporary, target)
    files.fsync_dir(target.parent)
    files.fsync_dir(temporary.parent)


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(v, levels - 1) for v in inside)


def _shown(data: bytes) -> str:
    return repr(data[:40])[1:]
