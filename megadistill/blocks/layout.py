"""Layout of a store: its file names, and the checks of its JSON files."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megadistill.blocks.columns import Column, parse_columns
from megadistill.blocks.shard import SHARD_LIMIT
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.storage.files import Files, open_regular, read_file
from megadistill.storage.records import is_hex64, read_json

FORMAT_VERSION = 1
# Flags a store may carry that change how it is read. A reader that does not know one refuses.
# padding: the column `padding` counts the tokens at a sequence's end that belong to no document.
FEATURES = frozenset({"padding"})
KINDS = {"tokens": "tokens.json", "cache": "cache.json"}
MAX_BLOCKS = 1_000_000  # six digits
# Above what is ever written, and low enough that reading a hostile file takes no memory to speak of
# (parsed JSON is up to 30 times as large).
MAX_BLOCK_SIZE = 1 << 30  # a shard of 4 GiB has no room for more offsets
MAX_COLUMNS = 64
HEADER_LIMIT = MARKER_LIMIT = 1 << 22
MARKER_NAME = re.compile(r"[0-9]{6}\.json")
SHARD_NAME = re.compile(r"shard\.[0-9]{6}\.mds")


@dataclass(frozen=True)
class Layout:
    """Paths of a store's files. `run` is the folder beside it for locks and temporary files."""

    path: Path

    @property
    def blocks(self) -> Path:
        return self.path / "blocks"

    @property
    def run(self) -> Path:
        # Resolved, so that two names of one folder share one lock and one file system.
        path = self.path.resolve()
        return path.parent / f"{path.name}.run"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def blocks_bin(self) -> Path:
        return self.path / "blocks.bin"

    @property
    def index(self) -> Path:
        return self.path / "index.json"

    @property
    def ids_bin(self) -> Path:
        return self.path / "ids.bin"

    def header(self, kind: str) -> Path:
        return self.path / KINDS[kind]

    def marker(self, block: int) -> Path:
        return self.blocks / f"{block:06d}.json"

    def shard(self, block: int) -> Path:
        return self.path / shard_name(block)


def shard_name(block: int) -> str:
    """Returns the only name that a block's shard may have."""
    return f"shard.{block:06d}.mds"


def kind_of(path: Path) -> str | None:
    """Returns the kind of store in a folder, or None. Raises StoreError for two at once."""
    kinds = [kind for kind, name in KINDS.items() if (path / name).is_file()]
    if len(kinds) > 1:
        raise StoreError(f"{path}: holds both {' and '.join(KINDS.values())}, expected one")
    return kinds[0] if kinds else None


def prepare_folder(layout: Layout, kind: str, files: Files) -> str | None:
    """Makes the folder, or checks that it can become a store. Returns the kind that it holds.

    StoreError for a folder that holds anything else: nothing in it is touched.
    """
    found = check_folder(layout, kind)
    files.mkdir(layout.blocks)
    return found


def check_folder(layout: Layout, kind: str) -> str | None:
    """Whether the folder holds a store of `kind` (returned), or can become one (None).

    StoreError for a folder that holds anything else. Writes nothing.
    """
    path = layout.path
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path}: is a file, expected a folder: choose another place")
    found = kind_of(path) if path.is_dir() else None
    if found not in (None, kind):
        raise StoreError(
            f"{path}: holds a store of kind {found}, expected {kind}: choose another folder"
        )
    if found is None and path.is_dir():
        # A run that died before the header was in place leaves these, and they hold nothing.
        began = {"blocks", "ids.bin"}
        others = sorted(
            p.name
            for p in path.iterdir()
            if p.name not in began or (p.is_dir() and any(p.iterdir()))
        )
        if others:
            raise StoreError(
                f"{path}: holds {others[0]}"
                + (f" and {len(others) - 1} other entries" if others[1:] else "")
                + f" but no {KINDS[kind]}: choose an empty folder, or one that is not there yet"
            )
    return found


def new_header(
    header: dict[str, Any],
    *,
    kind: str,
    columns: dict[str, str],
    block_size: int,
    ids_bin: bytes | None,
) -> dict[str, Any]:
    """Returns the whole header of a new store as JSON reads it back: tuples become lists."""
    full = {
        **header,
        "format_version": FORMAT_VERSION,
        "features": sorted(FEATURES & columns.keys()),
        "kind": kind,
        "block_size": block_size,
        "columns": columns | {"sum": "uint64"},
    }
    if ids_bin is not None:
        full["ids_bin"] = {"size": len(ids_bin), "xxh3": xxhash.xxh3_64_hexdigest(ids_bin)}
    return json.loads(json.dumps(full))


def read_header(layout: Layout, kind: str) -> tuple[dict[str, Any], list[Column]]:
    """(the header, its columns), checked. StoreError, CorruptBlockError."""
    file = layout.header(kind)
    header = read_json(file, limit=HEADER_LIMIT)
    version = header.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise StoreError(
            f"{file}: format version {_shown(version)}, this program reads {FORMAT_VERSION}: "
            "read it with the version of megadistill that wrote it"
        )
    features = header.get("features")
    if features != [] and (not isinstance(features, list) or set(map(str, features)) - FEATURES):
        names = ", ".join(sorted(FEATURES))
        raise StoreError(
            f"{file}: features {_shown(features)}, this program knows {names}: read it "
            "with the version of megadistill that wrote it"
        )
    _expect(file, "kind", header.get("kind"), header.get("kind") == kind, kind)
    size, columns, recipe = (header.get(key) for key in ("block_size", "columns", "recipe"))
    fits = type(size) is int and 0 < size <= MAX_BLOCK_SIZE
    _expect(file, "block_size", size, fits, f"1 to {MAX_BLOCK_SIZE}")
    _expect(file, "recipe", recipe, isinstance(recipe, dict), "an object")
    texts = isinstance(columns, dict) and all(isinstance(e, str) for e in columns.values())
    _expect(file, "columns", columns, texts, "names and encodings")
    assert isinstance(columns, dict)
    complete = columns.get("sum") == "uint64" and "tokens" in columns
    complete = complete and len(columns) <= MAX_COLUMNS
    _expect(file, "columns", columns, complete, "tokens, and sum as uint64")
    ids = header.get("ids_bin", {"size": 0, "xxh3": "0" * 16})
    known = isinstance(ids, dict) and type(ids.get("size")) is int and is_hex64(ids.get("xxh3"))
    _expect(file, "ids_bin", ids, known and ids["size"] >= 0, "size and xxh3")
    if not layout.blocks.is_dir() or layout.blocks.is_symlink():
        raise CorruptBlockError(str(layout.blocks), "a folder", "none, or a link")
    parsed = parse_columns(columns)
    uint32 = any(c.name == "tokens" and c.encoding.startswith("ndarray:uint32") for c in parsed)
    _expect(file, "columns.tokens", columns["tokens"], uint32, "ndarray:uint32")
    padded = "padding" in columns
    flagged = bool(features) == padded
    _expect(file, "features", features, flagged, "padding with the column padding, and only then")
    if padded:
        fits = columns["padding"] == "uint64" and "documents" in columns
        _expect(file, "columns.padding", columns["padding"], fits, "uint64, with documents")
    return header, parsed


def read_ids(layout: Layout, header: dict[str, Any]) -> bytes | None:
    """ids.bin as the header announces it; None where it announces none. CorruptBlockError."""
    expected, file = header.get("ids_bin"), str(layout.ids_bin)
    if expected is None:
        return None
    try:
        data = read_file(layout.ids_bin, limit=expected["size"])
    except FileNotFoundError:
        raise CorruptBlockError(file, f"{expected['size']} bytes", "no file") from None
    if len(data) != expected["size"]:
        raise CorruptBlockError(file, f"{expected['size']} bytes", f"{len(data)} bytes")
    found = xxhash.xxh3_64_hexdigest(data)
    if found != expected["xxh3"]:
        raise CorruptBlockError(file, f"xxh3 {expected['xxh3']}", found)
    return data


def read_plan(layout: Layout, block_size: int) -> int | None:
    """Returns the planned number of sequences, or None without a plan."""
    try:
        plan = read_json(layout.plan, limit=1 << 16)
    except FileNotFoundError:
        return None
    total = plan.get("num_sequences")
    most = block_size * MAX_BLOCKS
    fits = type(total) is int and 0 < total <= most
    _expect(layout.plan, "num_sequences", total, fits, f"1 to {most}")
    assert isinstance(total, int)
    _expect(
        layout.plan,
        "num_blocks",
        plan.get("num_blocks"),
        plan.get("num_blocks") == -(-total // block_size),
        -(-total // block_size),
    )
    return total


def read_marker(layout: Layout, block: int, block_size: int) -> dict[str, Any]:
    """A block's marker, checked. FileNotFoundError where there is none, CorruptBlockError."""
    file = layout.marker(block)
    marker = read_json(file, limit=MARKER_LIMIT)
    number, count = marker.get("block"), marker.get("sequences")
    _expect(file, "block", number, type(number) is int and number == block, block)
    fits = type(count) is int and 0 < count <= block_size
    _expect(file, "sequences", count, fits, f"1 to {block_size}")
    shard = marker.get("shard")
    _expect(
        file,
        "shard",
        shard,
        isinstance(shard, dict)
        and shard.get("file") == shard_name(block)
        and type(shard.get("size")) is int
        and 0 < shard["size"] < SHARD_LIMIT
        and is_hex64(shard.get("xxh3")),
        f"file {shard_name(block)}, size and xxh3",
    )
    for key in ("tokens_xxh3", "content_hash"):
        _expect(file, key, marker.get(key), is_hex64(marker.get(key)), "16 hexadecimal digits")
    _expect(file, "statistics", None, isinstance(marker.get("statistics"), dict), "an object")
    return marker


def same_bytes(path: Path, data: bytes) -> bool:
    """Whether a file holds exactly `data`."""
    try:
        handle, size = open_regular(path)
    except FileNotFoundError:
        return False
    os.close(handle)
    return size == len(data) and read_file(path, limit=size) == data


def _expect(file: Path, field: str, found: object, fits: bool, expected: object) -> None:
    if not fits:
        raise CorruptBlockError(str(file), f"{field}: {expected}", _shown(found))


def _shown(value: object) -> str:
    return repr(value)[:80]
