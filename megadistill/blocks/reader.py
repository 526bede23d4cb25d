"""Reading a block store: a directory of MDS shards, committed block by block, verified on reading.

Token stores and caches are both block stores, so resuming, merging and verifying are written once.
A block counts when its marker is in place. `writer.py` says how it gets there, and
`remote/mirror_cache.py` reads a store at a URL.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from megadistill.blocks.derived import (
    RECORD,
    combined_hash,
    encode_blocks_bin,
    encode_index,
    known_blocks,
    record_of,
)
from megadistill.blocks.layout import (
    KINDS,
    MARKER_NAME,
    Layout,
    kind_of,
    read_header,
    read_ids,
    read_marker,
    read_plan,
    same_bytes,
)
from megadistill.blocks.recipe import NAMES
from megadistill.blocks.shard import OpenShards, Shard
from megadistill.errors import StoreError
from megadistill.storage.files import named_os_errors, names_in

Sample = dict[str, Any]


class BlockReader:
    """A store in a folder, to read. `open_store` opens one at a URL as well.

    Sequence i is sample i % block_size of block i // block_size; only the last planned block may
    be shorter. Safe to read from several threads.
    """

    is_remote = False

    def __init__(self, path: str | Path, *, kind: str) -> None:
        self.path = Path(path)
        self.layout = Layout(self.path)
        self.kind = kind
        self.header, self.parsed_columns = read_header(self.layout, kind)
        self._shards = OpenShards()
        self._seen: dict[int, tuple] = {}  # the files whose xxh3 was right
        self._total = read_plan(self.layout, self.block_size)
        self._records = known_blocks(self.layout.blocks_bin)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The store in a folder, of either kind. StoreError, CorruptBlockError."""
        return cls(path, kind=kind_in(path))

    def __reduce__(self) -> tuple:
        # To another process goes the folder's name; the files are opened there.
        return type(self).open, (self.path,)

    @property
    def name(self) -> str:
        """The folder or the URL, for messages and reports."""
        return str(self.path)

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything the bytes of a block depend on."""
        return self.header["recipe"]

    @property
    def names(self) -> dict[str, str]:
        """Returns names of models and data, by key, for reading; {} in a store without names."""
        found = self.header.get(NAMES)
        found = found if isinstance(found, dict) else {}
        return {k: v for k, v in found.items() if isinstance(v, str)}

    @property
    def block_size(self) -> int:
        """Sequences a block."""
        return self.header["block_size"]

    @property
    def columns(self) -> dict[str, str]:
        """Column name to MDS encoding."""
        return self.header["columns"]

    def ids_bin(self) -> bytes | None:
        """The store's ids.bin, verified; None for a store without one. CorruptBlockError."""
        return read_ids(self.layout, self.header)

    @property
    def num_sequences(self) -> int | None:
        """Sequences the store will hold when complete; None before that is planned."""
        return self._total

    @property
    def num_blocks(self) -> int | None:
        """Blocks the store will hold when complete; None before that is planned."""
        return None if self._total is None else -(-self._total // self.block_size)

    # Blocks --------------------------------------------------------------------------------------

    def committed(self) -> list[int]:
        """The blocks whose marker is in place, ascending. Looks at the directory each time."""
        blocks = self.present()
        if self._total is None:
            return blocks
        last = self.num_blocks - 1  # type: ignore[operator]
        blocks = [b for b in blocks if b <= last]
        if blocks and blocks[-1] == last:
            expected = self._total - last * self.block_size
            if int(self._record(last)["sequences"]) != expected:
                blocks.pop()
        return blocks

    def present(self) -> list[int]:
        """The blocks that have a marker, planned or not, ascending."""
        names = names_in(self.layout.blocks)
        return sorted(int(name[:6]) for name in names if MARKER_NAME.fullmatch(name))

    def missing(self) -> list[int]:
        """The planned blocks that are not committed, ascending. StoreError without a plan."""
        if self._total is None:
            raise StoreError(f"{self.path}: how many sequences it will hold is not planned yet")
        committed = set(self.committed())
        return [b for b in range(self.num_blocks or 0) if b not in committed]

    def complete(self) -> bool:
        """Whether every planned block is committed and every derived file is what it must be.

        Reads all markers and asks for the size of all shards; reads no shard. CorruptBlockError
        for a damaged marker.
        """
        if self._total is None or self.missing() or len(self.present()) != self.num_blocks:
            return False
        return self.consistent()

    def consistent(self) -> bool:
        """Whether the committed blocks' shards are there and the derived files follow from them."""
        markers = self._markers()
        return (
            all(self.shard_is_there(m) for m in markers)
            and same_bytes(self.layout.blocks_bin, encode_blocks_bin(markers))
            and same_bytes(self.layout.index, encode_index(markers, self.parsed_columns))
        )

    # Reading -------------------------------------------------------------------------------------

    def __len__(self) -> int:
        blocks = self.committed()
        if not blocks:
            return 0
        return (len(blocks) - 1) * self.block_size + int(self._record(blocks[-1])["sequences"])

    def __getitem__(self, index: int) -> Sample:
        """Sequence `index`, verified: column to array (fresh, writable), bytes or int."""
        block, row = divmod(index, self.block_size)
        if index >= 0 and (self._total is None or index < self._total):
            shard = self._shard(block)
            if row < len(shard):
                return shard[row]
        raise IndexError(f"{self.path}: no sequence {index}")

    def block(self, block: int) -> list[Sample]:
        """All samples of a block, verified."""
        shard = self._shard(block)
        return [shard[row] for row in range(len(shard))]

    def __iter__(self) -> Iterator[Sample]:
        for block in self.committed():
            yield from self.block(block)

    def marker(self, block: int) -> dict[str, Any]:
        """A block's marker. StoreError where it is not committed, CorruptBlockError."""
        try:
            return read_marker(self.layout, block, self.block_size)
        except FileNotFoundError:
            raise StoreError(
                f"{self.path}: block {block} is missing: generate again, and it is made"
            ) from None

    @contextmanager
    def shard_file(self, block: int) -> Iterator[Path]:
        """The file of a block's shard, which stays where it is meanwhile."""
        yield self.layout.shard(block)

    def shard_is_there(self, marker: dict[str, Any]) -> bool:
        """Whether the marker's shard has the size it must have; its bytes are not read."""
        path = self.layout.shard(marker["block"])
        with named_os_errors("look at", path):
            try:
                status = path.lstat()
            except FileNotFoundError:
                return False
        return stat.S_ISREG(status.st_mode) and status.st_size == marker["shard"]["size"]

    def lost_shards(self) -> list[Path]:
        """The shards of committed blocks that are gone or of another size."""
        return [
            self.layout.shard(m["block"]) for m in self._markers() if not self.shard_is_there(m)
        ]

    def content_hash(self) -> str:
        """128 bits, hexadecimal, over the content of the committed blocks in block order."""
        records = [self._record(b) for b in self.committed()]
        return combined_hash(np.array(records, RECORD))

    def tokens_xxh3(self) -> np.ndarray:
        """uint64: of each committed block the hash of its token ids, equal for equal text.

        From blocks.bin, or of blocks that it does not know yet from their markers.
        """
        return np.array([self._record(b)["tokens_xxh3"] for b in self.committed()], np.uint64)

    def drop_copies(self) -> None:
        """Forget local copies of the bytes, so that what is read next is fetched anew."""

    # Inside --------------------------------------------------------------------------------------

    def _markers(self) -> list[dict[str, Any]]:
        return [self.marker(b) for b in self.committed()]

    def _record(self, block: int) -> np.void:
        at = int(np.searchsorted(self._records["block"], block))
        if at < len(self._records) and self._records["block"][at] == block:
            return self._records[at]
        return record_of(self.marker(block))

    def _shard(self, block: int) -> Shard:
        return self._shards.get(block, self._open_shard)

    def _open_shard(self, block: int) -> Shard:
        record = self._record(block)
        shard = Shard(
            self.layout.shard(block),
            columns=self.parsed_columns,
            first=block * self.block_size,
            samples=int(record["sequences"]),
            size=int(record["shard_size"]),
            xxh3=int(record["shard_xxh3"]),
            seen=self._seen.get(block),
        )
        # A shuffle over more blocks than are kept open would hash a whole shard for each sample.
        self._seen[block] = shard.identity
        return shard


def kind_in(path: str | Path) -> str:
    """The kind of the store in a folder. StoreError where there is none."""
    if not Path(path).is_dir():
        raise StoreError(f"{path}: no such folder, expected a cache or a token store")
    kind = kind_of(Path(path))
    if kind is None:
        raise StoreError(
            f"{path}: holds no {' or '.join(KINDS.values())}: not a cache or a token store"
        )
    return kind
