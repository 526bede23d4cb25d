"""Shards: one MDS file for each block. Written by mosaicml-streaming, read by our own reader.

An MDS file is

    uint32 n | uint32 offsets [n+1] | JSON of the columns | n records

Reading believes nothing before it is checked: the whole file is compared with its xxh3 when it is
opened, the header must be byte for byte the one these columns have, offsets must not decrease nor
leave the file, and every record is verified by its own checksum at every read, so that a file that
changes after it was opened is found as well. It imports no streaming, which costs 3 to 5 seconds.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megadistill.blocks.columns import Column, decode_record, encode_record, hashed_part
from megadistill.blocks.padding import padding_problem
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.storage.files import named_os_errors, open_regular, read_at, xxh3_of
from megadistill.storage.records import hex64

SHARD_LIMIT = 1 << 32  # MDS offsets have 32 bits


def shard_config(columns: list[Column]) -> dict[str, Any]:
    """Returns the MDS description of a shard, in its header and again in index.json."""
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
    """The samples of one block, read one by one from the open file.

    path      the file
    columns   of the store, in name order
    first     sequence number of the first sample
    samples   how many the marker says there are
    size      bytes the marker says there are
    xxh3      of the whole file, as the marker says; None: not looked at
    seen      `identity` of an earlier opening, whose file need not be read again
    Raises CorruptBlockError where the file is absent or anything else than this.
    """

    def __init__(
        self,
        path: Path,
        *,
        columns: list[Column],
        first: int,
        samples: int,
        size: int,
        xxh3: int | None = None,
        seen: tuple | None = None,
    ) -> None:
        self.path, self.columns, self.first = path, columns, first
        self.samples, self.size = samples, size
        try:
            self._handle, found = open_regular(path)
        except FileNotFoundError:
            raise CorruptBlockError(str(path), f"{size} bytes", "no file") from None
        self.close = weakref.finalize(self, os.close, self._handle)
        try:
            if found != size:
                raise CorruptBlockError(str(path), f"{size} bytes", f"{found} bytes")
            status = os.fstat(self._handle)
            # What changes when somebody replaces or rewrites the file.
            self.identity = (status.st_dev, status.st_ino, status.st_mtime_ns, xxh3)
            if xxh3 is not None and self.identity != seen and (found := self.xxh3()) != xxh3:
                raise CorruptBlockError(str(path), f"xxh3 {hex64(xxh3)}", hex64(found))
            self._offsets = self._checked_offsets()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index` of the block, verified."""
        sequence = self.first + index
        sample = decode_record(
            self.columns, self.record(index), sequence=sequence, file=str(self.path)
        )
        problem = padding_problem(sample)
        if problem is not None:
            raise CorruptBlockError(f"{self.path}, sequence {sequence}", *problem)
        return sample

    def record(self, index: int) -> bytes:
        """The bytes of sample `index`, not verified."""
        return self._read(self._offsets[index], self._offsets[index + 1])

    def xxh3(self) -> int:
        """The checksum of the whole file."""
        return xxh3_of(self._handle, self.path)

    def content_hash(self) -> int:
        """xxh3_64 over all records without their sums: the same wherever the block stands."""
        digest = xxhash.xxh3_64()
        for index in range(self.samples):
            digest.update(hashed_part(self.columns, self.record(index), file=str(self.path)))
        return digest.intdigest()

    def _read(self, start: int, stop: int) -> bytes:
        data = read_at(self._handle, self.path, start, stop)
        if len(data) != stop - start:
            raise CorruptBlockError(str(self.path), f"{stop} bytes", f"{start + len(data)} bytes")
        return data

    def _checked_offsets(self) -> list[int]:
        size = self.size
        config = json.dumps(shard_config(self.columns), sort_keys=True).encode()
        start = 4 + 4 * (self.samples + 1) + len(config)
        if size < start:
            raise CorruptBlockError(str(self.path), f"at least {start} bytes", f"{size} bytes")
        head = self._read(0, start)
        found = int.from_bytes(head[:4], "little")
        if found != self.samples:
            raise CorruptBlockError(str(self.path), f"{self.samples} samples", found)
        table = 4 + 4 * (self.samples + 1)
        if head[table:] != config:
            raise CorruptBlockError(str(self.path), "the columns of the store", "others")
        offsets = np.frombuffer(head[4:table], "<u4").astype(np.int64)
        if offsets[0] != start or offsets[-1] != size or (np.diff(offsets) < 0).any():
            raise CorruptBlockError(
                str(self.path), f"offsets that rise from {start} to {size}", "others"
            )
        return offsets.tolist()


class OpenShards:
    """The shards last read from, kept open. Safe to use from several threads."""

    def __init__(self, *, most: int = 64) -> None:
        # Bounded by file descriptors, not by memory.
        self._most = most
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, block: int, opened: Callable[[int], Shard]) -> Shard:
        """The shard of a block; `opened` opens one that is not there."""
        with self._lock:
            if block in self._shards:
                self._shards.move_to_end(block)
                return self._shards[block]
        shard = opened(block)
        with self._lock:
            self._shards[block] = shard
            if len(self._shards) > self._most:
                self._shards.popitem(last=False)  # closed when its last reader lets go
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
    path = folder / "shard.00000.mds"
    with named_os_errors("write", path):
        writer = mds_writer()(
            columns={c.name: c.encoding for c in columns}, out=str(folder), size_limit=None
        )
        for sample, (_, digest) in zip(samples, encoded, strict=True):
            writer.write({**sample, "sum": np.uint64(digest)})
        writer.finish()
        size = path.stat().st_size
    shard = Shard(path, columns=columns, first=first, samples=len(samples), size=size)
    for index, (record, _) in enumerate(encoded):
        if shard.record(index) != record:
            raise CorruptBlockError(str(path), f"record {index} as encoded", "another")
    return path, shard
