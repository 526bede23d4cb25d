"""Writing a block store: blocks become durable one by one, their marker last.

    shard under a temporary name, fsync, rename, fsync of both directories;
    marker under a temporary name, fsync, rename, fsync of both directories.

So a kill at any point leaves a block either whole or absent. Nothing of time, host or rank is in
a store's bytes: those go to the folder `<store>.run` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from megadistill.blocks.anew import (
    log_begun_anew,
    must_begin_anew,
    replace_header,
    require_same_shape,
    write_header,
)
from megadistill.blocks.derived import RECORD, encode_blocks_bin, encode_index, read_blocks_bin
from megadistill.blocks.install import (
    install_block,
    is_installed,
    marker_of,
    put,
    retract_block,
    temporary_folder,
)
from megadistill.blocks.layout import (
    MARKER_LIMIT,
    MAX_BLOCKS,
    SHARD_NAME,
    Layout,
    new_header,
    prepare_folder,
    read_header,
    same_bytes,
    shard_name,
)
from megadistill.blocks.reader import BlockReader, Sample, kind_in
from megadistill.blocks.recipe import Keys
from megadistill.blocks.remote.object_store import read_only
from megadistill.blocks.shard import write_shard
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.storage.disk import is_url
from megadistill.storage.files import LOCAL, Files, names_in
from megadistill.storage.lock import PATIENCE_S, StoreLock, require_holder, token_of
from megadistill.storage.records import encode_json

_OWN_KEYS = {"block", "sequences", "shard", "tokens_xxh3", "content_hash"}


class BlockWriter(BlockReader):
    """A store in a folder, to write and read. Made by `create`, `create_like` or `open`.

    Safe to commit different blocks to from several threads, processes and hosts.
    """

    def __init__(self, path: str | Path, *, kind: str, files: Files = LOCAL) -> None:
        super().__init__(path, kind=kind)
        self._files = files
        # The run this object writes for: whoever holds the lock by now, and after `lock` itself.
        self._lock: StoreLock | None = None
        self._token = token_of(self.layout.run / "lock")

    @classmethod
    def open(cls, path: str | Path, *, files: Files = LOCAL) -> Self:
        """The store in a folder, of either kind. StoreError, CorruptBlockError."""
        if is_url(path):
            raise read_only(str(path))
        return cls(path, kind=kind_in(path), files=files)

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
    ) -> Self:
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
        if store.begin_anew(full, ids_bin):
            store = cls(path, kind=kind, files=files)
        require_same_shape(store, full, keys)
        return store

    @classmethod
    def create_like(
        cls,
        path: str | Path,
        source: BlockReader,
        *,
        header: dict[str, Any] | None = None,
        keys: Keys | None = None,
        files: Files = LOCAL,
    ) -> Self:
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

    def begin_anew(self, header: dict[str, Any], ids_bin: bytes | None) -> bool:
        """Replace the header of a store without blocks by another one; whether that was done.

        LockedError while another run writes the store.
        """
        if not must_begin_anew(self.layout, self.header, header, ids_bin) or self.present():
            return False
        with self.lock():
            if self.present():  # committed since by a run that has ended
                return False
            self.clean()
            replace_header(self._files, self.layout, self.kind, header, ids_bin)
        log_begun_anew(self.layout, self.header, header)
        return True

    # Planning ------------------------------------------------------------------------------------

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

    # Writing -------------------------------------------------------------------------------------

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
                temporary / "shard",
                samples,
                columns=self.parsed_columns,
                first=block * self.block_size,
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
            self.layout.index: encode_index(markers, self.parsed_columns),
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

    def lock(self, *, patience_s: float = PATIENCE_S) -> StoreLock:
        """The right to write this store, as a context manager. LockedError while another has it.

        patience_s  how long a holder on another host may show no heartbeat before it counts as
                    dead; one on this host is looked up by its process number at once
        """
        self._files.mkdir(self.layout.run)
        path = self.layout.run / "lock"
        self._lock = StoreLock(path, what=str(self.path), patience_s=patience_s)
        return self._lock

    def adopt(self, block: int, source: BlockReader) -> None:
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

    # Inside --------------------------------------------------------------------------------------

    def _require_lock(self) -> None:
        """LockedError where the run this object writes for does not hold the lock any more."""
        token = self._lock.token if self._lock and self._lock.entered else self._token
        require_holder(self.layout.run / "lock", token, what=str(self.path))

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
