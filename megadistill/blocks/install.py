"""Installing and retracting a block: the order of operations that a crash may interrupt.

A crash after any single operation leaves the block whole, or absent. tests/blocks/test_crash.py
stops after each of them.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megadistill.blocks.layout import Layout, same_bytes, shard_name
from megadistill.blocks.padding import without_padding
from megadistill.blocks.shard import Shard
from megadistill.errors import CorruptBlockError
from megadistill.storage.files import Files, open_regular, xxh3_of
from megadistill.storage.records import hex64, put_file


def install_block(
    files: Files,
    layout: Layout,
    block: int,
    *,
    shard: Path,
    marker: bytes,
    temporary: Path,
    guard: Callable[[], None],
) -> None:
    """Makes a block durable: the shard first, its marker last.

    shard      the complete file, in a folder of its own under `temporary`
    temporary  from `temporary_folder`
    guard      called before each of the two appears; raises if another run has taken over the store
    """
    guard()
    if layout.marker(block).exists():
        retract_block(files, layout, block)
    files.fsync(shard)
    files.replace(shard, layout.shard(block))
    files.fsync_dir(layout.path)
    files.fsync_dir(shard.parent)
    # A run that took the lock since may have removed the shard, having found it without a marker.
    guard()
    put_file(files, layout.marker(block), marker, temporary=temporary / "marker")


def retract_block(files: Files, layout: Layout, block: int) -> None:
    """Retracts a block, so that its shard can be replaced without contradicting its marker."""
    # The derived files go first: they may know fewer blocks than there are, and never another one.
    files.unlink(layout.blocks_bin)
    files.unlink(layout.index)
    files.fsync_dir(layout.path)
    files.unlink(layout.marker(block))
    files.fsync_dir(layout.blocks)


def is_installed(layout: Layout, block: int, *, marker: dict[str, Any], data: bytes) -> bool:
    """Whether the block is there, byte for byte. `data` is the marker's bytes."""
    if not same_bytes(layout.marker(block), data):
        return False
    path = layout.shard(block)
    try:
        handle, size = open_regular(path)
    except (FileNotFoundError, CorruptBlockError):
        return False
    try:
        right = size == marker["shard"]["size"]
        return right and hex64(xxh3_of(handle, path)) == marker["shard"]["xxh3"]
    finally:
        os.close(handle)


def marker_of(
    block: int,
    samples: list[dict[str, Any]],
    shard: Shard,
    *,
    statistics: dict[str, Any],
    content_hash: str | None,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Returns the marker of a written shard."""
    return {
        **extra,
        "block": block,
        "sequences": len(samples),
        "shard": {"file": shard_name(block), "size": shard.size, "xxh3": hex64(shard.xxh3())},
        "tokens_xxh3": tokens_hash(samples),
        "content_hash": content_hash or hex64(shard.content_hash()),
        "statistics": statistics,
    }


def tokens_hash(samples: list[dict[str, Any]]) -> str:
    """xxh3_64 over the token ids of the samples, uint32, one sequence after another.

    With the column `padding`, padding counts as its length (uint64) and not as token ids.
    """
    digest = xxhash.xxh3_64()
    for sample in samples:
        digest.update(np.ascontiguousarray(without_padding(sample)).data)
        if "padding" in sample:
            digest.update(int(sample["padding"]).to_bytes(8, "little"))
    return digest.hexdigest()


def put(files: Files, layout: Layout, path: Path, data: bytes) -> None:
    """Write a file of the store whole and durably, or leave it as it was."""
    temporary = temporary_folder(files, layout)
    try:
        put_file(files, path, data, temporary=temporary / path.name)
    finally:
        files.remove_tree(temporary)


def temporary_folder(files: Files, layout: Layout) -> Path:
    """A new folder beside the store, on its file system, for one writer."""
    # Unique to this writer: ranks of several hosts share the store.
    path = layout.run / "tmp" / uuid.uuid4().hex
    files.mkdir(path)
    return path
