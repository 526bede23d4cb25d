"""Checking every byte of a store against what the store says of itself.

Blocks are checked in threads: checksums release the interpreter lock and run at disk speed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import xxhash

from megadistill.blocks.derived import encode_blocks_bin, encode_index, read_blocks_bin, record_of
from megadistill.blocks.files import read_file
from megadistill.blocks.install import tokens_hash
from megadistill.blocks.layout import KINDS, MARKER_NAME, SHARD_NAME, Layout, same_bytes, shard_name
from megadistill.blocks.records import hex64, read_json
from megadistill.blocks.shard import Shard
from megadistill.errors import CorruptBlockError, StoreError

if TYPE_CHECKING:
    from megadistill.blocks.store import BlockStore, Sample

Check = Callable[[list["Sample"], dict[str, Any]], list[str]]


def verify_store(
    store: BlockStore,
    *,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
    check: Check | None = None,
) -> list[str]:
    """What is wrong with a store, a line each; nothing for a sound one, complete or not.

    workers   threads
    progress  called with each block's number when it is checked, in block order
    check     called with each sound block's samples and marker, for what only the caller knows
    """
    present = store.present()
    findings = _names(store, present)
    markers = []

    def one(block: int) -> tuple[dict[str, Any] | None, list[str]]:
        try:
            return verify_block(store, block, check=check)
        except StoreError as error:
            return None, [str(error)]

    with ThreadPoolExecutor(max_workers=workers) as pool:
        for block, (marker, found) in zip(present, pool.map(one, present), strict=True):
            findings += found
            if marker is not None:
                markers.append(marker)
            if progress:
                progress(block)
    if len(markers) == len(present):
        findings += _derived(store, markers)
    return findings + _ids(store)


def verify_block(
    store: BlockStore, block: int, *, check: Check | None = None
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
            columns=store._columns,
            first=block * store.block_size,
            samples=marker["sequences"],
            size=marker["shard"]["size"],
        )
    if hex64(shard.xxh3()) != marker["shard"]["xxh3"]:
        raise CorruptBlockError(
            str(shard.path), f"xxh3 {marker['shard']['xxh3']}", hex64(shard.xxh3())
        )
    samples = [shard[row] for row in range(len(shard))]
    found = {"tokens_xxh3": tokens_hash(samples), "content_hash": hex64(shard.content_hash())}
    findings += [
        f"{file}: {key}: expected {value} from the shard, found {marker[key]}"
        for key, value in found.items()
        if marker[key] != value
    ]
    return marker, findings + (check(samples, marker) if check else [])


def read_markers(store: BlockStore) -> tuple[list[dict[str, Any]], list[str]]:
    """(the markers that can be believed, in block order; what is wrong with the others)."""
    markers, findings = [], []
    for block in store.present():
        try:
            markers.append(store.marker(block))
        except StoreError as error:
            findings.append(str(error))
    return markers, findings


def _sequences(store: BlockStore, block: int) -> int | None:
    """How many sequences a block must have; None where it may have any."""
    if store.num_sequences is None:
        return None
    return max(0, min(store.block_size, store.num_sequences - block * store.block_size))


def _names(store: BlockStore, present: list[int]) -> list[str]:
    """Entries that are no part of a store. Their presence is told, and nothing else done."""
    known = {"plan.json", "blocks.bin", "index.json", "ids.bin", "blocks", KINDS[store.kind]}
    shards = {shard_name(b) for b in present}
    findings = []
    for path in sorted(store.path.iterdir()):
        if path.name in known | shards and not path.is_symlink():
            continue
        if SHARD_NAME.fullmatch(path.name) and path.name not in shards:
            findings.append(f"{path}: a shard without a marker: left by a run that died")
        else:
            findings.append(f"{path}: no part of a store, or a link")
    findings += [
        f"{path}: no part of a store, or a link"
        for path in sorted(store.layout.blocks.iterdir())
        if not MARKER_NAME.fullmatch(path.name) or path.is_symlink()
    ]
    return findings


def _derived(store: BlockStore, markers: list[dict[str, Any]]) -> list[str]:
    layout, total = store.layout, store.num_blocks
    if total is not None and len(markers) == total:
        expected = {
            layout.blocks_bin: encode_blocks_bin(markers),
            layout.index: encode_index(markers, store._columns),
        }
        return [
            f"{path}: differs from what the markers say: generate again, which mends it"
            for path, data in expected.items()
            if not same_bytes(path, data)
        ]
    return _lagging(layout, markers)


def _lagging(layout: Layout, markers: list[dict[str, Any]]) -> list[str]:
    """An unfinished store's derived files may know fewer blocks, and nothing else."""
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
        if layout.index.exists():
            read_json(layout.index, limit=1 << 32)
    except StoreError as error:
        return [str(error)]
    return []


def _ids(store: BlockStore) -> list[str]:
    expected = store.header.get("ids_bin")
    path = store.layout.ids_bin
    if expected is None:
        return [f"{path}: not announced in the header"] if path.exists() else []
    try:
        data = read_file(path, limit=int(expected["size"]))
        found = xxhash.xxh3_64_hexdigest(data)
    except FileNotFoundError:
        found = "no file"
    except (StoreError, TypeError, KeyError) as error:
        return [str(error)]
    return (
        []
        if found == expected["xxh3"]
        else [f"{path}: expected xxh3 {expected['xxh3']}, found {found}"]
    )
