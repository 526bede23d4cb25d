"""Checking every byte of a store against what the store says of itself.

Blocks are checked in processes, see pool.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megadistill.blocks.derived import (
    encode_blocks_bin,
    encode_index,
    index_entries,
    read_blocks_bin,
    record_of,
)
from megadistill.blocks.install import tokens_hash
from megadistill.blocks.layout import KINDS, MARKER_NAME, SHARD_NAME, same_bytes, shard_name
from megadistill.blocks.maintenance.pool import each_block
from megadistill.blocks.reader import BlockReader, Sample
from megadistill.blocks.shard import Shard
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.storage.files import names_in
from megadistill.storage.records import hex64, read_json

# What is wrong with a block's samples and marker, a line each.
Check = Callable[[list[Sample], dict[str, Any]], list[str]]
# A store's check, or None where there is nothing to add.
CheckOf = Callable[[BlockReader], Check | None]


def no_check(_: BlockReader) -> None:
    """The CheckOf of those who have nothing to add."""


def verify_store(
    store: BlockReader,
    *,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
    check: Check | None = None,
) -> list[str]:
    """Returns the errors in a store, a line each; none for a sound one, complete or not.

    workers   processes; `check` must then be a function of a module or a method, see pool.py
    progress  called with each block's number when it is checked, in block order
    check     called with each sound block's samples and marker, for what only the caller knows
    """
    store.drop_copies()
    present = store.present()
    findings = _names(store, present)
    markers = []
    results = each_block(_told, (store, check), present, workers=workers)
    for block, (marker, found) in zip(present, results, strict=True):
        findings += found
        if marker is not None:
            markers.append(marker)
        if progress:
            progress(block)
    if len(markers) == len(present):
        findings += _derived(store, markers)
    return findings + _ids(store)


def _told(
    context: tuple[BlockReader, Check | None], block: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """(the marker of a block that can be read, what is wrong with the block)."""
    store, check = context
    try:
        return verify_block(store, block, check=check)
    except StoreError as error:
        return None, [str(error)]


def verify_block(
    store: BlockReader, block: int, *, check: Check | None = None
) -> tuple[dict[str, Any], list[str]]:
    """(the block's marker, what is wrong with the block). CorruptBlockError for the rest."""
    marker = store.marker(block)
    file = str(store.layout.marker(block))
    findings = []
    expected = _sequences(store, block)
    if expected is not None and marker["sequences"] != expected:
        findings.append(
            f"{file}: sequences: expected {expected} by the plan, found {marker['sequences']}"
        )
    with store.shard_file(block) as path:
        shard = Shard(
            path,
            columns=store.parsed_columns,
            first=block * store.block_size,
            samples=marker["sequences"],
            size=marker["shard"]["size"],
            xxh3=int(marker["shard"]["xxh3"], 16),
        )
    samples = [shard[row] for row in range(len(shard))]
    found = {"tokens_xxh3": tokens_hash(samples)}
    if store.kind == "tokens":  # of a cache it is taken over integers, which `check` knows
        found["content_hash"] = hex64(shard.content_hash())
    findings += [
        f"{file}: {key}: expected {value} from the shard, found {marker[key]}"
        for key, value in found.items()
        if marker[key] != value
    ]
    return marker, findings + (check(samples, marker) if check else [])


def read_markers(store: BlockReader) -> tuple[list[dict[str, Any]], list[str]]:
    """(the markers that can be believed, in block order; what is wrong with the others)."""
    markers, findings = [], []
    for block in store.present():
        try:
            markers.append(store.marker(block))
        except StoreError as error:
            findings.append(str(error))
    return markers, findings


def _sequences(store: BlockReader, block: int) -> int | None:
    """How many sequences a block must have; None where it may have any."""
    if store.num_sequences is None:
        return None
    return max(0, min(store.block_size, store.num_sequences - block * store.block_size))


def _names(store: BlockReader, present: list[int]) -> list[str]:
    """Returns findings about entries that are not part of a store, which are left alone."""
    known = {"plan.json", "blocks.bin", "index.json", "ids.bin", "blocks", KINDS[store.kind]}
    shards = {shard_name(b) for b in present}
    findings = []
    for name in sorted(names_in(store.path)):
        if name in known | shards and not (store.path / name).is_symlink():
            continue
        if SHARD_NAME.fullmatch(name) and name not in shards:
            findings.append(f"{store.path / name}: a shard without a marker: left by a dead run")
        else:
            findings.append(f"{_plain(store.path, name)}: no part of a store, or a link")
    folder = store.layout.blocks
    findings += [
        f"{_plain(folder, name)}: no part of a store, or a link"
        for name in sorted(names_in(folder))
        if not MARKER_NAME.fullmatch(name) or (folder / name).is_symlink()
    ]
    return findings


def _plain(folder: Path, name: str) -> str:
    """A path for a message, whatever a stranger put into the name: line ends, escapes, no text."""
    return f"{folder}/{ascii(name)[1:-1]}"


def _derived(store: BlockReader, markers: list[dict[str, Any]]) -> list[str]:
    layout, total = store.layout, store.num_blocks
    if total is not None and len(markers) == total:
        expected = {
            layout.blocks_bin: encode_blocks_bin(markers),
            layout.index: encode_index(markers, store.parsed_columns),
        }
        return [
            f"{path}: differs from what the markers say: generate again, which rewrites it"
            for path, data in expected.items()
            if not same_bytes(path, data)
        ]
    return _lagging(store, markers)


def _lagging(store: BlockReader, markers: list[dict[str, Any]]) -> list[str]:
    """An unfinished store's derived files may know fewer blocks, and nothing else."""
    layout = store.layout
    try:
        by_block = {int(r["block"]): r for r in read_blocks_bin(layout.blocks_bin)}
        for marker in markers:
            record = by_block.pop(marker["block"], None)
            if record is not None and record != record_of(marker):
                raise CorruptBlockError(
                    str(layout.blocks_bin), f"block {marker['block']} as its marker", "another"
                )
        if by_block:
            raise CorruptBlockError(str(layout.blocks_bin), "committed blocks", min(by_block))
        _lagging_index(store, markers)
    except StoreError as error:
        return [str(error)]
    return []


def _lagging_index(store: BlockReader, markers: list[dict[str, Any]]) -> None:
    path = store.layout.index
    try:
        index = read_json(path, limit=len(encode_index(markers, store.parsed_columns)))
    except FileNotFoundError:
        return
    entries = {json.dumps(e, sort_keys=True) for e in index_entries(markers, store.parsed_columns)}
    shards = index.get("shards")
    known = isinstance(shards, list) and all(
        json.dumps(s, sort_keys=True) in entries for s in shards
    )
    if index.get("version") != 2 or not known:
        raise CorruptBlockError(str(path), "entries as their markers say", "others")


def _ids(store: BlockReader) -> list[str]:
    if store.header.get("ids_bin") is None:
        path = store.layout.ids_bin
        return [f"{path}: not announced in the header"] if os.path.lexists(path) else []
    try:
        store.ids_bin()
    except StoreError as error:
        return [str(error)]
    return []
