"""Local files: finding them, telling what they are, and reading text files.

A text file is one document. It is read in pieces, so a text of any size costs no memory (which is
why this does not go through `datasets`: its text loader gives lines, or reads a file as a whole).
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from megadistill.config import DataConfig
from megadistill.data.sources.base import Document, Source
from megadistill.data.sources.compressed import SUFFIXES, is_compressed, plain_name, reason, shown
from megadistill.errors import DataError
from megadistill.storage.counter_rng import permutation

KINDS = {
    "parquet": (".parquet",),
    "json": (".jsonl", ".json", ".ndjson"),
    "arrow": (".arrow",),
    "text": (".txt", ".text", ".md"),
}
_SHUFFLE = 4  # purpose of the permutation
_MIB = 1 << 20


def find(patterns: list[str]) -> list[str]:
    """The files that the patterns name: in the order of the patterns, sorted within each.

    A name of a file or folder that exists is meant literally, also with `*`, `?` or brackets in it.
    A file that several patterns name, or that a loop of links repeats, is read once. A link to a
    file is a file of its own.
    """
    found: list[str] = []
    taken: set[str] = set()
    for pattern in patterns:
        kept = []
        for path in sorted(_matches(pattern), key=lambda path: (path.count("/"), path)):
            place = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            if place not in taken:
                taken.add(place)
                kept.append(path)
        found += sorted(kept)
    if not found:
        raise DataError("data.files: the list is empty: name a file or a pattern")
    if not any(_size(path) for path in found):
        first = shown(next(iter(found)))
        raise DataError(f"{first}: the corpus is empty (0 bytes in {len(found)} files)")
    return found


def _matches(pattern: str) -> list[str]:
    if "\0" in pattern:
        raise DataError(f"data.files: no file is named {shown(pattern)}")
    if os.path.lexists(pattern) and not Path(pattern).is_file():
        kind = "a folder" if Path(pattern).is_dir() else "no regular file"
        if not os.path.exists(pattern):
            kind = "a link to nothing"
        advice = f", for example {os.path.join(shown(pattern), '*.jsonl')}"
        raise DataError(
            f"data.files: {shown(pattern)} is {kind}, expected files: name them"
            + (advice if kind == "a folder" else "")
        )
    found = glob.glob(_escaped(pattern), recursive=True)
    matches = sorted(match for match in found if Path(match).is_file())
    if not matches:
        advice = ""
        if pattern.startswith("~"):
            advice = ": ~ is no folder here: write the path from /"
        elif "://" in pattern:
            advice = ": expected local files: download it, or set data.name to a dataset on the hub"
        raise DataError(
            f"data.files: no file matches {shown(pattern)!r} (looked from "
            f"{shown(str(Path.cwd()))}){advice}"
        )
    return matches


def _escaped(pattern: str) -> str:
    """`pattern` with its literal part escaped: the longest path at its beginning that exists."""
    parts = pattern.split("/")
    for count in range(len(parts), 0, -1):
        literal = "/".join(parts[:count])
        if literal and os.path.lexists(literal):
            return "/".join([glob.escape(literal), *parts[count:]])
    return pattern


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {reason(error)}") from error


def kind(paths: list[str]) -> str:
    """Returns the kind of all files: parquet, json, arrow or text."""
    kinds: dict[str, str] = {}
    for path in paths:
        suffix = Path(plain_name(path)).suffix.lower()
        known = [k for k, endings in KINDS.items() if suffix in endings]
        if not known:
            endings = ", ".join(e for group in KINDS.values() for e in group)
            raise DataError(
                f"{shown(path)}: cannot tell what it holds by its name: expected {endings}; text "
                f"and json also with {', '.join(SUFFIXES)}"
            )
        if is_compressed(path) and known[0] not in ("json", "text"):
            raise DataError(
                f"{shown(path)}: {known[0]} files are compressed inside, and read at any place: "
                "decompress it"
            )
        kinds.setdefault(known[0], path)
    if len(kinds) > 1:
        (a, first), (b, second), *_ = ((k, shown(path)) for k, path in kinds.items())
        raise DataError(f"data.files: {first} is {a} and {second} is {b}: one kind at a time")
    return next(iter(kinds))


def fingerprint(path: str) -> str:
    """xxh3_128 of a file's size and content.

    Of a file over 64 MiB, 64 pieces of 1 MiB spread evenly over it are taken, so that looking at a
    corpus of terabytes again takes seconds a thousand files.
    """
    size = _size(path)
    digest = xxhash.xxh3_128(str(size).encode())
    try:
        with Path(path).open("rb") as file:
            if size <= 64 * _MIB:
                while chunk := file.read(_MIB):
                    digest.update(chunk)
            else:
                for piece in range(64):
                    file.seek((size - _MIB) * piece // 63)
                    digest.update(file.read(_MIB))
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {reason(error)}") from error
    return digest.hexdigest()


def content_identity(paths: list[str]) -> str:
    """Returns a digest of the files, in their order, whatever their names."""
    digest = hashlib.sha256("\n".join(map(fingerprint, paths)).encode())
    return digest.hexdigest()


def is_text(config: DataConfig) -> bool:
    """Whether `data.files` are text files, which this module reads."""
    return kind(find(config.files or [])) == "text"


class TextFiles(Source):
    """Text files of `data.files`, each one document."""

    def read(self, config: DataConfig, start: int) -> Iterator[Document]:
        """The documents from number `start` on."""
        for path in _ordered(config)[start:]:
            yield Document(file=path, place=shown(path), limit=config.max_document_mib * _MIB)

    def identity(self, config: DataConfig) -> dict[str, Any]:
        """Returns the identity of the corpus, for the recipe."""
        return {"source": "text", "content": content_identity(_ordered(config))}

    def count(self, config: DataConfig) -> int:
        """How many documents there are."""
        return len(find(config.files or []))


TEXT_FILES = TextFiles()


def _ordered(config: DataConfig) -> list[str]:
    paths = find(config.files or [])
    if config.shuffle:
        paths = [paths[i] for i in permutation(len(paths), config.seed, _SHUFFLE)]
    return paths
