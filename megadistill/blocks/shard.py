"""Shards: one MDS file for each block. Written by mosaicml-streaming, read by our own reader.

An MDS file is

    uint32 n | uint32 offsets [n+1] | JSON of the columns | n records

Reading maps the file and believes nothing before it is checked: the header must be byte for byte
the one these columns have, offsets must not decrease nor leave the file, and every record is
verified by its own checksum. It imports no streaming, which costs 3 to 5 seconds.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megadistill.blocks.columns import Column, decode_record, encode_record, hashed_part
from megadistill.blocks.files import open_regular
from megadistill.errors import CorruptBlockError, StoreError

SHARD_LIMIT = 1 << 32  # MDS offsets have 32 bits


def shard_config(columns: list[Column]) -> dict[str, Any]:
    """What MDS says of a shard in its header, and again in index.json."""
    return {
        "column_encodings": [c.encoding for c in columns],
        "column_names": [c.name for c in columns],
        "column_sizes": [c.size for c in columns],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": None,
        "version": 2,
    }


class Shard:
    """The samples of one block, mapped into memory.

    path      the file
    columns   of the store, in name order
    first     sequence number of the first sample
    samples   how many the marker says there are
    size      bytes the marker says there are
    Raises CorruptBlockError where the file is absent or anything else than this.
    """

    def __init__(
        self, path: Path, *, columns: list[Column], first: int, samples: int, size: int
    ) -> None:
        self.path, self.columns, self.first = path, columns, first
        self.samples, self.size = samples, size
        try:
            handle, found = open_regular(path)
        except FileNotFoundError:
            raise CorruptBlockError(str(path), f"{size} bytes", "no file") from None
        try:
            if found != size:
                raise CorruptBlockError(str(path), f"{size} bytes", f"{found} bytes")
            config = json.dumps(shard_config(columns), sort_keys=True).encode()
            start = 4 + 4 * (samples + 1) + len(config)
            if size < start:
                raise CorruptBlockError(str(path), f"at least {start} bytes", f"{size} bytes")
            self._map = mmap.mmap(handle, size, access=mmap.ACCESS_READ)
        finally:
            os.close(handle)
        self._offsets = self._checked_offsets(config, start=start, size=size)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index` of the block, verified."""
        return decode_record(
            self.columns, self.record(index), sequence=self.first + index, file=str(self.path)
        )

    def record(self, index: int) -> bytes:
        """The bytes of sample `index`, not verified."""
        return self._map[self._offsets[index] : self._offsets[index + 1]]

    def xxh3(self) -> int:
        """The checksum of the whole file."""
        return xxhash.xxh3_64_intdigest(self._map)

    def content_hash(self) -> int:
        """xxh3_64 over all records without their sums: the same wherever the block stands."""
        digest = xxhash.xxh3_64()
        for index in range(self.samples):
            digest.update(hashed_part(self.columns, self.record(index), file=str(self.path)))
        return digest.intdigest()

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    def _checked_offsets(self, config: bytes, *, start: int, size: int) -> list[int]:
        found = int.from_bytes(self._map[:4], "little")
        if found != self.samples:
            raise CorruptBlockError(str(self.path), f"{self.samples} samples", found)
        table = 4 + 4 * (self.samples + 1)
        if self._map[table:start] != config:
            raise CorruptBlockError(str(self.path), "the columns of the store", "others")
        offsets = np.frombuffer(self._map[4:table], "<u4").astype(np.int64)
        if offsets[0] != start or offsets[-1] != size or (np.diff(offsets) < 0).any():
            raise CorruptBlockError(
                str(self.path), f"offsets that rise from {start} to {size}", "others"
            )
        return offsets.tolist()


class OpenShards:
    """The shards last read from, kept mapped. Safe to use from several threads."""

    def __init__(self, *, most: int = 64) -> None:
        # Bounded by file descriptors, not by memory.
        self._most = most
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, block: int, opened: Callable[[int], Shard]) -> Shard:
        """The shard of a block; `opened` maps one that is not there."""
        with self._lock:
            if block in self._shards:
                self._shards.move_to_end(block)
                return self._shards[block]
        shard = opened(block)
        with self._lock:
            self._shards[block] = shard
            if len(self._shards) > self._most:
                self._shards.popitem(last=False)  # unmapped when its last reader lets go
        return shard

    def drop(self, block: int) -> None:
        """Forget a block whose shard was replaced."""
        with self._lock:
            self._shards.pop(block, None)


def write_shard(
    folder: Path, samples: list[dict[str, Any]], *, columns: list[Column], first: int
) -> tuple[Path, Shard]:
    """Write the samples as one MDS shard into `folder`, which must be new or empty.

    Returns the file, not yet durable, and a reader of it that has verified every sample: what
    was written is what will be read, whatever version of streaming wrote it.
    ValueError for samples that do not fit the columns, StoreError for more than 4 GiB.
    """
    from megadistill.blocks.mds import mds_writer

    encoded = [encode_record(columns, s, sequence=first + i) for i, s in enumerate(samples)]
    size = sum(len(record) + 4 for record, _ in encoded) + 4096
    if size >= SHARD_LIMIT:
        raise StoreError(
            f"{folder}: a block would take {size} bytes, and a shard holds {SHARD_LIMIT}: "
            "set a smaller block_size"
        )
    writer = mds_writer()(
        columns={c.name: c.encoding for c in columns}, out=str(folder), size_limit=None
    )
    for sample, (_, digest) in zip(samples, encoded, strict=True):
        writer.write({**sample, "sum": np.uint64(digest)})
    writer.finish()
    path = folder / "shard.00000.mds"
    shard = Shard(
        path, columns=columns, first=first, samples=len(samples), size=path.stat().st_size
    )
    for index, (record, _) in enumerate(encoded):
        if shard.record(index) != record:
            raise CorruptBlockError(str(path), f"record {index} as encoded", "another")
    return path, shard
