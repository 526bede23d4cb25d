"""Local files: finding them, telling what they are, and reading text files.

A text file is one document. It is read in pieces, so a text of any size costs no memory (which is
why this does not go through `datasets`: its text loader gives lines, or reads a file as a whole).
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from megadistill.config import DataConfig
from megadistill.data.document import Document
from megadistill.data.hashing import permutation
from megadistill.errors import DataError

KINDS = {
    "parquet": (".parquet",),
    "json": (".jsonl", ".json", ".ndjson"),
    "arrow": (".arrow",),
    "text": (".txt", ".text", ".md"),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_SHUFFLE = 4  # purpose of the permutation
_MIB = 1 << 20


def find(patterns: list[str]) -> list[str]:
    """The files that the patterns name: in the order of the patterns, sorted within each."""
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = sorted(m for m in glob.glob(pattern, recursive=True) if Path(m).is_file())
        if not matches:
            raise DataError(f"data.files: no file matches {pattern!r} (looked from {Path.cwd()})")
        found.update(dict.fromkeys(matches))
    if not found:
        raise DataError("data.files: the list is empty: name a file or a pattern")
    if not any(Path(f).stat().st_size for f in found):
        raise DataError(f"{next(iter(found))}: the corpus is empty (0 bytes in {len(found)} files)")
    return list(found)


def kind(paths: list[str]) -> str:
    """What all of them are: parquet, json, arrow or text."""
    kinds: dict[str, str] = {}
    for path in paths:
        suffixes = [s for s in Path(path).suffixes if s.lower() not in _COMPRESSED]
        suffix = suffixes[-1].lower() if suffixes else ""
        known = [k for k, endings in KINDS.items() if suffix in endings]
        if not known:
            endings = ", ".join(e for group in KINDS.values() for e in group)
            raise DataError(f"{path}: cannot tell what it holds by its name: expected {endings}")
        kinds.setdefault(known[0], path)
    if len(kinds) > 1:
        (a, first), (b, second), *_ = kinds.items()
        raise DataError(f"data.files: {first} is {a} and {second} is {b}: one kind at a time")
    return next(iter(kinds))


def fingerprint(path: str) -> str:
    """xxh3_128 of a file's size and content.

    Of a file over 64 MiB, 64 pieces of 1 MiB spread evenly over it are taken, so that looking at a
    corpus of terabytes again takes seconds a thousand files.
    """
    size = Path(path).stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with Path(path).open("rb") as file:
        if size <= 64 * _MIB:
            while chunk := file.read(_MIB):
                digest.update(chunk)
        else:
            for piece in range(64):
                file.seek((size - _MIB) * piece // 63)
                digest.update(file.read(_MIB))
    return digest.hexdigest()


def content_identity(paths: list[str]) -> str:
    """One digest over the files, in their order, whatever their names."""
    digest = hashlib.sha256("\n".join(map(fingerprint, paths)).encode())
    return digest.hexdigest()


def is_text(config: DataConfig) -> bool:
    """Whether `data.files` are text files, which this module reads."""
    return kind(find(config.files or [])) == "text"


def read(config: DataConfig, start: int) -> Iterator[Document]:
    """The documents from number `start` on."""
    for path in _ordered(config)[start:]:
        yield Document(file=path)


def identity(config: DataConfig) -> dict[str, Any]:
    """What the corpus is, for the recipe."""
    return {"source": "text", "content": content_identity(_ordered(config))}


def count(config: DataConfig) -> int:
    """How many documents there are."""
    return len(find(config.files or []))


def _ordered(config: DataConfig) -> list[str]:
    paths = find(config.files or [])
    if config.shuffle:
        paths = [paths[i] for i in permutation(len(paths), config.seed, _SHUFFLE)]
    return paths
