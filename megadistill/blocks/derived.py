"""The two files that follow from the markers: blocks.bin and index.json.

blocks.bin lets 100,000 blocks be opened by reading one file. It may lag behind the markers, and
never contradicts them: a block that is done again removes both files first.

    "MDBLOCKS" | uint32 version | uint32 bytes a record | uint64 records | the records | uint64 xxh3

Little-endian; records in block order; the xxh3_64 is of all that precedes it. index.json is the
index that mosaicml-streaming reads: 380 bytes a block.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megadistill.blocks.columns import Column
from megadistill.blocks.layout import MAX_BLOCKS
from megadistill.blocks.shard import shard_config
from megadistill.errors import CorruptBlockError
from megadistill.storage.files import read_file
from megadistill.storage.records import encode_json

RECORD = np.dtype(
    [
        ("block", "<u4"),
        ("sequences", "<u4"),
        ("shard_size", "<u8"),
        ("shard_xxh3", "<u8"),
        ("tokens_xxh3", "<u8"),
        ("content_hash", "<u8"),
        ("marker_xxh3", "<u8"),
    ]
)
_HEAD = struct.Struct("<8sIIQ")
_MAGIC, _VERSION = b"MDBLOCKS", 1


def record_of(marker: dict[str, Any]) -> Any:
    """A marker's fixed-size record, a scalar of dtype RECORD."""
    record = np.zeros((), RECORD)
    record["block"], record["sequences"] = marker["block"], marker["sequences"]
    record["shard_size"] = marker["shard"]["size"]
    record["shard_xxh3"] = int(marker["shard"]["xxh3"], 16)
    record["tokens_xxh3"] = int(marker["tokens_xxh3"], 16)
    record["content_hash"] = int(marker["content_hash"], 16)
    record["marker_xxh3"] = xxhash.xxh3_64_intdigest(encode_json(marker))
    return record[()]


def encode_blocks_bin(markers: list[dict[str, Any]]) -> bytes:
    """The bytes of blocks.bin for these markers, which are in block order."""
    records = np.array([record_of(m) for m in markers], RECORD)
    data = _HEAD.pack(_MAGIC, _VERSION, RECORD.itemsize, len(records)) + records.tobytes()
    return data + xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")


def read_blocks_bin(path: Path) -> np.ndarray:
    """The records in block order; none where there is no file. CorruptBlockError."""
    limit = _HEAD.size + MAX_BLOCKS * RECORD.itemsize + 8
    try:
        data = read_file(path, limit=limit)
    except FileNotFoundError:
        return np.zeros(0, RECORD)
    body, found = data[:-8], data[-8:]
    expected = xxhash.xxh3_64_intdigest(body)
    if len(data) < _HEAD.size + 8 or int.from_bytes(found, "little") != expected:
        raise CorruptBlockError(str(path), f"xxh3 {expected:016x}", found[::-1].hex())
    magic, version, size, count = _HEAD.unpack_from(body)
    if (magic, version, size) != (_MAGIC, _VERSION, RECORD.itemsize):
        raise CorruptBlockError(str(path), f"version {_VERSION} of blocks.bin", "another")
    if len(body) != _HEAD.size + count * size:
        raise CorruptBlockError(str(path), f"{count} records", f"{len(body)} bytes")
    records = np.frombuffer(body, RECORD, offset=_HEAD.size)
    if (np.diff(records["block"].astype(np.int64)) <= 0).any():
        raise CorruptBlockError(str(path), "records in block order", "another order")
    return records


def known_blocks(path: Path) -> np.ndarray:
    """The records of blocks.bin; none where it is absent or damaged: the markers have it all."""
    try:
        return read_blocks_bin(path)
    except CorruptBlockError:
        return np.zeros(0, RECORD)


def encode_index(markers: list[dict[str, Any]], columns: list[Column]) -> bytes:
    """The bytes of index.json for these markers, which are in block order."""
    return encode_json({"version": 2, "shards": index_entries(markers, columns)})


def index_entries(markers: list[dict[str, Any]], columns: list[Column]) -> list[dict[str, Any]]:
    """Returns the entry of each shard in index.json."""
    config = shard_config(columns) | {"hashes": ["xxh3_64"], "zip_data": None}
    return [
        config
        | {
            "samples": marker["sequences"],
            "raw_data": {
                "basename": marker["shard"]["file"],
                "bytes": marker["shard"]["size"],
                "hashes": {"xxh3_64": marker["shard"]["xxh3"]},
            },
        }
        for marker in markers
    ]


def combined_hash(records: np.ndarray) -> str:
    """The store's content_hash: xxh3_128 over (block, sequences, content_hash), each uint64."""
    rows = np.stack([records[k].astype("<u8") for k in ("block", "sequences", "content_hash")], 1)
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(rows).tobytes())
