"""The block store: a directory of MDS shards, committed block by block, verified on reading.

Token stores and caches are both block stores, so resuming, merging and verifying are written once.
A block counts when its marker is in place, and the marker is put in place last:

    shard under a temporary name, fsync, rename, fsync of both directories;
    marker under a temporary name, fsync, rename, fsync of both directories.

So a kill at any point leaves a block either whole or absent. Nothing of time, host or rank is in
a store's bytes: those go to the folder `<store>.run` beside it.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megadistill.blocks.anew import begin_anew, shape_of, write_header
from megadistill.blocks.derived import (
    RECORD,
    combined_hash,
    encode_blocks_bin,
    encode_index,
    known_blocks,
    read_blocks_bin,
    record_of,
)
from megadistill.blocks.install import (
    install_block,
    is_installed,
    marker_of,
    put,
    retract_block,
    temporary_folder,
)
from megadistill.blocks.layout import (
    KINDS,
    MARKER_LIMIT,
    MARKER_NAME,
    MAX_BLOCKS,
    SHARD_NAME,
    Layout,
    kind_of,
    new_header,
    prepare_folder,
    read_header,
    read_ids,
    read_marker,
    read_plan,
    same_bytes,
    shard_name,
)
from megadistill.blocks.recipe import NAMES, Keys, require_same_recipe
from megadistill.blocks.remote.object_store import read_only
from megadistill.blocks.shard import OpenShards, Shard, write_shard
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.storage.disk import is_url
from megadistill.storage.files import LOCAL, Files, named_os_errors, names_in
from megadistill.storage.lock import StoreLock, require_holder, token_of
from megadistill.storage.records import encode_json

if TYPE_CHECKING:
    from megadistill.blocks.remote.shard_cache import LocalCopies

Sample = dict[str, Any]
_OWN_KEYS = {"block", "sequences", "shard", "tokens_xxh3", "content_hash"}


class BlockStore:
    """A store in a folder. Made by `create` (to write) or `open` (to read).

    Sequence i is sample i % block_size of block i // block_size; only the last planned block may
    be shorter. Safe to read from several threads, and to commit different blocks to from several
    threads, processes and hosts.
    """

    def __init__(self, path: str | Path, *, kind: str, files: Files = LOCAL) -> None:
        self.path = Path(path)
        self.layout = Layout(self.path)
        self.kind = kind
        self._files = files
        self.header, self._columns = read_header(self.layout, kind)
        # The run this object writes for: whoever holds the lock by now, and after `lock` itself.
        self._lock: StoreLock | None = None
        self._token = token_of(self.layout.run / "lock")
        self._shards = OpenShards()
        self._seen: dict[int, tuple] = {}  # the files whose xxh3 was right
        self._total = read_plan(self.layout, self.block_size)
        self._records = known_blocks(self.layout.blocks_bin)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        kind: str,
        header: dict[str, Any],
        columns: dict[str, str],
        block_size: int,
        ids_bin: bytes | None = None,
        keys: Keys | None = None,
        files: Files = LOCAL,
    ) -> BlockStore:
        """A new store, or the one that is there if it has the same kind, shape and recipe.

        header   must hold "recipe"; never changed once a block is committed
        columns  column name to MDS encoding; `sum` is added
        keys     what the user calls the recipe's fields, for messages
        A store without blocks begins anew with another recipe, see `blocks.anew`.
        Raises RecipeError for another recipe, StoreError for a folder that holds something else,
        LockedError where a store without blocks would begin anew and another run writes it.
        """
        if is_url(path):
            raise read_only(str(path))
        layout = Layout(Path(path))
        full = new_header(
            header, kind=kind, columns=columns, block_size=block_size, ids_bin=ids_bin
        )
        if prepare_folder(layout, kind, files) is None:
            write_header(files, layout, kind, full, ids_bin)
        store = cls(path, kind=kind, files=files)
        if begin_anew(store, files, full, ids_bin):
            store = cls(path, kind=kind, files=files)
        require_same_recipe(
            shape_of(store.header),
            shape_of(full),
            file=str(layout.header(kind)),
            other="this run's is",
            keys=keys or Keys(),
            names=(store.names, full.get(NAMES, {})),
        )
        return store

    @classmethod
    def create_like(
        cls,
        path: str | Path,
        source: BlockStore,
        *,
        header: dict[str, Any] | None = None,
        keys: Keys | None = None,
        files: Files = LOCAL,
    ) -> BlockStore:
        """`create` with what `source` has: its shape, ids.bin, and header unless another is given.

        CorruptBlockError for a damaged ids.bin.
        """
        return cls.create(
            path,
            kind=source.kind,
            header=source.header if header is None else header,
            columns=source.columns,
            block_size=source.block_size,
            ids_bin=source.ids_bin(),
            keys=keys,
            files=files,
        )

    @classmethod
    def open(
        cls, path: str | Path, *, files: Files = LOCAL, local: LocalCopies | None = None
    ) -> BlockStore:
        """The store in a folder or at a URL, of either kind. StoreError, CorruptBlockError.

        local  where shards of a remote store are kept, see `blocks.mirror`
        """
        if is_url(path):
            from megadistill.blocks.remote.mirror_cache import open_remote

            return open_remote(str(path), local=local)
        if not Path(path).is_dir():
            raise StoreError(f"{path}: no such folder, expected a cache or a token store")
        kind = kind_of(Path(path))
        if kind is None:
            raise StoreError(
                f"{path}: holds no {' or '.join(KINDS.values())}: not a cache or a token store"
            )
        return cls(path, kind=kind, files=files)

    def __reduce__(self) -> tuple:
        # To another process goes the folder's name; the files are opened there.
        return BlockStore.open, (self.path,)

    is_remote = False

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

    # Planning -----------------------------------------------------------------------------------

    def plan(self, num_sequences: int | None) -> None:
        """Write how many sequences the store will hold; None takes the plan back.

        A token store plans when its source has ended, and takes the plan back before it grows. A
        cache plans at the start. A plan may be raised: a last block that was short under the old
        plan is then removed, to be done again. StoreError for a lower one.
        """
        self._require_lock()
        if num_sequences is None:
            self._files.unlink(self.layout.plan)
            self._files.fsync_dir(self.path)
            self._total = None
            return
        if num_sequences < 1:
            raise StoreError(f"{self.path}: {num_sequences} sequences, expected at least one")
        blocks = -(-num_sequences // self.block_size)
        if blocks > MAX_BLOCKS:
            raise StoreError(
                f"{self.path}: {num_sequences} sequences in blocks of {self.block_size} are "
                f"{blocks} blocks, the format holds {MAX_BLOCKS}: set block_size to at least "
                f"{-(-num_sequences // MAX_BLOCKS)}"
            )
        if num_sequences == self._total:
            return
        present = self.present()
        if (self._total or 0) > num_sequences or (present and present[-1] >= blocks):
            held = max(self._total or 0, len(present) and present[-1] * self.block_size + 1)
            raise StoreError(
                f"{self.path}: holds or plans {held} sequences, cannot be lowered to "
                f"{num_sequences}: choose another folder"
            )
        for block in present:
            short = (
                self.block_size if block < blocks - 1 else num_sequences - block * self.block_size
            )
            if int(self._record(block)["sequences"]) != short:
                retract_block(self._files, self.layout, block)
                self._forget()
        plan = {"num_sequences": num_sequences, "num_blocks": blocks}
        put(self._files, self.layout, self.layout.plan, encode_json(plan))
        self._total = num_sequences

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
            and same_bytes(self.layout.index, encode_index(markers, self._columns))
        )

    # Writing ------------------------------------------------------------------------------------

    def commit(
        self,
        block: int,
        samples: list[Sample],
        *,
        statistics: dict[str, Any],
        content_hash: str | None = None,
        **extra: Any,
    ) -> dict[str, Any]:
        """Make a block durable; returns its marker. When this returns, a power cut keeps it.

        samples       one dict a sequence, column to array or bytes; `sum` is added
        content_hash  what the samples say, where that is less than their bytes; 16 hex digits
        statistics    and extra (cursor, made_with, ...) go into the marker as they are
        A block that is there with the same bytes is left alone; with others, its marker is taken
        away before anything is replaced. LockedError where another run took the store's lock since
        this object was made: whoever was taken for dead writes nothing more.
        """
        if extra.keys() & _OWN_KEYS:
            raise ValueError(f"the marker's own keys cannot be set: {sorted(extra)}")
        if not 0 < len(samples) <= self.block_size or not 0 <= block < MAX_BLOCKS:
            raise ValueError(f"block {block} with {len(samples)} sequences does not fit the store")
        self._require_lock()
        temporary = temporary_folder(self._files, self.layout)
        try:
            path, shard = write_shard(
                temporary / "shard", samples, columns=self._columns, first=block * self.block_size
            )
            marker = marker_of(
                block, samples, shard, statistics=statistics, content_hash=content_hash, extra=extra
            )
            shard.close()
            self._install(block, path, marker, temporary)
        finally:
            self._files.remove_tree(temporary)
        return marker

    def finish(self) -> None:
        """Bring blocks.bin and index.json in line with the markers. Writes only what differs.

        CorruptBlockError where a marker's shard is gone or of another size.
        """
        self._require_lock()
        markers = self._markers()
        for marker in markers:
            if not self.shard_is_there(marker):
                path = self.layout.shard(marker["block"])
                found = "another size" if path.exists() else "no file"
                raise CorruptBlockError(str(path), f"{marker['shard']['size']} bytes", found)
        derived = {
            self.layout.blocks_bin: encode_blocks_bin(markers),
            self.layout.index: encode_index(markers, self._columns),
        }
        for path, data in derived.items():
            if not same_bytes(path, data):
                put(self._files, self.layout, path, data)
        self._records = read_blocks_bin(self.layout.blocks_bin)

    def retract(self, blocks: list[int]) -> None:
        """Take blocks back, the last one first: they are to be done again with other bytes.

        A crash in between leaves a prefix of the store. The plan stays as it is.
        """
        self._require_lock()
        for block in sorted(blocks, reverse=True):
            retract_block(self._files, self.layout, block)
            self._shards.drop(block)
            self._files.unlink(self.layout.shard(block))
        if blocks:
            self._files.fsync_dir(self.path)
            self._forget()

    def clean(self) -> None:
        """Remove what dead runs left: shards without a marker, temporary files.

        For rank 0, under the lock, before the first block is claimed: a living writer's shard
        looks the same as a dead one's. StoreError where the header is another one by now.
        """
        self._require_lock()
        if read_header(self.layout, self.kind)[0] != self.header:
            raise StoreError(
                f"{self.path}: another run began it anew with other settings in this moment: run "
                "the command again"
            )
        shards = self._shard_names()
        # A rank of a dead run may still live for seconds. Without its temporary files it cannot
        # complete a commit that is under way, and one that it begins later is not in `shards`.
        self._files.remove_tree(self.layout.run / "tmp")
        strays = self.strays(shards)
        for path in strays:
            self._files.unlink(path)
        if strays:
            self._files.fsync_dir(self.path)

    def strays(self, shards: list[str] | None = None) -> list[Path]:
        """The shards without a marker, of all that are there by default."""
        names = self._shard_names() if shards is None else shards
        present = {shard_name(b) for b in self.present()}
        return [self.path / n for n in names if n not in present]

    def _shard_names(self) -> list[str]:
        return sorted(n for n in names_in(self.path) if SHARD_NAME.fullmatch(n))

    def lock(self, *, patience_s: float = 60.0) -> StoreLock:
        """The right to write this store, as a context manager. LockedError while another has it.

        patience_s  how long a holder on another host may show no heartbeat before it counts as
                    dead; one on this host is looked up by its process number at once
        """
        self._files.mkdir(self.layout.run)
        path = self.layout.run / "lock"
        self._lock = StoreLock(path, what=str(self.path), patience_s=patience_s)
        return self._lock

    def adopt(self, block: int, source: BlockStore) -> None:
        """Take a block over from a store of the same recipe, sharing its bytes on disk."""
        temporary = temporary_folder(self._files, self.layout)
        try:
            path = temporary / "shard" / "shard"
            self._files.mkdir(path.parent)
            with source.shard_file(block) as shard:
                self._files.link(shard, path)
            self._install(block, path, source.marker(block), temporary)
        finally:
            self._files.remove_tree(temporary)

    # Reading ------------------------------------------------------------------------------------

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

    def verify(
        self,
        *,
        workers: int = 1,
        progress: Callable[[int], object] | None = None,
        check: Callable[[list[Sample], dict[str, Any]], list[str]] | None = None,
    ) -> list[str]:
        """Check every byte; returns what is wrong, a line each. See `blocks.verify`."""
        from megadistill.blocks.maintenance.verify import verify_store

        return verify_store(self, workers=workers, progress=progress, check=check)

    # Inside -------------------------------------------------------------------------------------

    def _require_lock(self) -> None:
        """LockedError where the run this object writes for does not hold the lock any more."""
        token = self._lock.token if self._lock and self._lock.entered else self._token
        require_holder(self.layout.run / "lock", token, what=str(self.path))

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
            columns=self._columns,
            first=block * self.block_size,
            samples=int(record["sequences"]),
            size=int(record["shard_size"]),
            xxh3=int(record["shard_xxh3"]),
            seen=self._seen.get(block),
        )
        # A shuffle over more blocks than are kept open would hash a whole shard for each sample.
        self._seen[block] = shard.identity
        return shard

    def _install(self, block: int, shard: Path, marker: dict[str, Any], temporary: Path) -> None:
        data = encode_json(marker)
        if len(data) > MARKER_LIMIT:
            raise StoreError(
                f"{self.layout.marker(block)}: would take {len(data)} bytes, the format allows "
                f"{MARKER_LIMIT}: set a smaller block_size"
            )
        if is_installed(self.layout, block, marker=marker, data=data):
            return
        self._forget()
        install_block(
            self._files,
            self.layout,
            block,
            shard=shard,
            marker=data,
            temporary=temporary,
            guard=self._require_lock,
        )
        self._shards.drop(block)

    def _forget(self) -> None:
        """Believe the markers alone until the next `finish`."""
        self._records = np.zeros(0, RECORD)
