"""Remote stores, read through a bounded folder of local copies.

A store at a URL is mirrored below `local_dir`, laid out as the store is. Header, plan, blocks.bin
and ids.bin are fetched when it is opened, markers and shards when they are asked for. blocks.bin
says which blocks there are, one request for 100,000 of them; where it lags behind the plan, blocks/
is listed as well. A shard is downloaded under a temporary name and takes its own when its size and
xxh3 are its marker's. One that is not is downloaded once more, then it is a CorruptBlockError.

A process keeps as many shards open as fit an eighth of the limit, so that eight ranks of a host
stay within it. Ranks share the folder through locks and renames: a host downloads a shard once.

A file:// URL is mirrored too: that is how a slow network file system is read once only.
"""

from __future__ import annotations

import os
import weakref
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megadistill.blocks.install import put
from megadistill.blocks.layout import KINDS, MARKER_NAME, Layout, same_bytes, shard_name
from megadistill.blocks.reader import BlockReader
from megadistill.blocks.remote.object_store import Remote
from megadistill.blocks.remote.shard_cache import (
    LocalCopies,
    default_folder,
    file_xxh3,
    locked,
    shared,
)
from megadistill.blocks.shard import OpenShards, Shard
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.storage.files import LOCAL, read_file
from megadistill.storage.records import hex64

_SMALL, _LARGE = 1 << 26, 1 << 32  # most bytes of a JSON or blocks.bin; of index.json
_LOCKS = 64  # downloads at a time, in all processes of a host, that do not wait for each other
_MOST_OPEN = 64
_MARKERS = 8  # markers fetched together, when one is asked for: a request takes 5 to 50 ms


def open_remote(url: str, *, local: LocalCopies | None = None) -> RemoteReader:
    """The store at `url`, of either kind. StoreError, CorruptBlockError."""
    remote, local = Remote(url), local or LocalCopies(default_folder())
    headers = {kind: remote.find(name, limit=1 << 24) for kind, name in KINDS.items()}
    kinds = [kind for kind, data in headers.items() if data is not None]
    if len(kinds) != 1:
        names = " and ".join(KINDS.values()) if kinds else "no " + " or ".join(KINDS.values())
        raise StoreError(f"{remote.name}: holds {names}: not a cache or a token store")
    header = headers[kinds[0]]
    assert header is not None
    layout = Layout(local.mirror(remote.name, header))
    LOCAL.mkdir(layout.blocks)
    LOCAL.mkdir(layout.run)
    for path, data in (
        (layout.header(kinds[0]), header),
        (layout.plan, remote.find(layout.plan.name, limit=1 << 16)),
        (layout.blocks_bin, remote.find(layout.blocks_bin.name, limit=_SMALL)),
    ):
        _bring(layout, path, data)
    return RemoteReader(url, remote, layout.path, kind=kinds[0], local=local)


class RemoteReader(BlockReader):
    """A store at a URL. `path` is its local mirror, `name` the URL without credentials."""

    is_remote = True

    def __init__(
        self, url: str, remote: Remote, path: Path, *, kind: str, local: LocalCopies
    ) -> None:
        super().__init__(path, kind=kind)
        self._url, self._remote, self._local = url, remote, local
        self._believed: set[int] = set()  # blocks whose local marker it has
        self._sizes: dict[str, int] | None = None
        self._present = self._listed()
        largest = max((int(s) for s in self._records["shard_size"]), default=1)
        most = local.limit // 8 // max(1, largest)
        self._shards = OpenShards(most=max(1, min(_MOST_OPEN, most)))
        self._fetch_ids()

    def __reduce__(self) -> tuple:
        # To another process goes the URL; the mirror is the same.
        return _reopened, (self._url, self._local)

    @property
    def name(self) -> str:
        """The URL, without credentials."""
        return self._remote.name

    def present(self) -> list[int]:
        """The blocks that had a marker when the store was opened, ascending."""
        return self._present

    def marker(self, block: int) -> dict[str, Any]:
        """A block's marker, fetched where it is not here yet."""
        if block not in self._believed:
            at = bisect_left(self._present, block)
            if self._present[at : at + 1] != [block]:
                raise StoreError(
                    f"{self.name}: block {block} is missing: generate again, and it is made"
                )
            self._fetch_markers(self._present[at : at + _MARKERS])
        return super().marker(block)

    def consistent(self) -> bool:
        """Whether the derived files, uploaded last, hold every block, whose shards are there.

        Of the shards, sizes are asked for; no marker is fetched.
        """
        sizes = self._all_sizes()
        return (
            len(self._records) == len(self._present)
            and "index.json" in sizes
            and all(sizes.get(shard_name(r["block"])) == r["shard_size"] for r in self._records)
        )

    def shard_is_there(self, marker: dict[str, Any]) -> bool:
        """Whether the marker's shard has the size it must have, at its URL."""
        return self._all_sizes().get(marker["shard"]["file"]) == marker["shard"]["size"]

    def drop_copies(self) -> None:
        """Forget the local copies of shards and fetch index.json again."""
        index = self._remote.find(self.layout.index.name, limit=_LARGE)
        _bring(self.layout, self.layout.index, index)
        for block in self.present():
            self._drop(block)

    @contextmanager
    def shard_file(self, block: int) -> Iterator[Path]:
        """A local copy of a block's shard, downloaded where it is not here, and kept meanwhile."""
        handle = self._held(block)
        try:
            yield self.layout.shard(block)
        finally:
            os.close(handle)

    def _open_shard(self, block: int) -> Shard:
        for last in (False, True):
            handle = self._held(block)
            try:
                shard = super()._open_shard(block)
            except CorruptBlockError:
                os.close(handle)
                if last:
                    raise
                self._drop(block)  # the copy was damaged here: fetch it anew
            else:
                weakref.finalize(shard, os.close, handle)
                return shard
        raise AssertionError("unreachable")

    def _held(self, block: int) -> int:
        """A descriptor whose shared lock keeps the local copy of a shard from being removed."""
        path = self.layout.shard(block)
        for _ in range(100):
            if not path.exists():
                self._fetch_shard(block)
            handle = shared(path)
            if handle is not None:
                return handle
        raise StoreError(f"{path}: vanishes before it is read: raise cache.local_limit")

    def _drop(self, block: int) -> None:
        """Forget the local copy; who has it open keeps what it has."""
        self._shards.drop(block)
        self.layout.shard(block).unlink(missing_ok=True)

    def _listed(self) -> list[int]:
        blocks = set(self._records["block"].tolist())
        if self._total is None or len(blocks) != self.num_blocks:
            names = self._remote.sizes("blocks")
            blocks |= {int(name[:6]) for name in names if MARKER_NAME.fullmatch(name)}
        return sorted(blocks)

    def _all_sizes(self) -> dict[str, int]:
        if self._sizes is None:
            self._sizes = self._remote.sizes()
        return self._sizes

    def _fetch_ids(self) -> None:
        expected = self.header.get("ids_bin")
        if not isinstance(expected, dict) or _is(self.layout.ids_bin, expected):
            return
        data = self._remote.find("ids.bin", limit=int(expected["size"]))
        _bring(self.layout, self.layout.ids_bin, data)
        if not _is(self.layout.ids_bin, expected):
            raise CorruptBlockError(
                self._remote.place("ids.bin"), f"xxh3 {expected['xxh3']}", "another, or no file"
            )

    def _fetch_markers(self, blocks: list[int]) -> None:
        """Fetch the markers of these blocks; what is wrong with the first is raised."""
        wanted = [b for b in blocks if b not in self._believed]
        with ThreadPoolExecutor(_MARKERS) as pool:
            fetched = [(b, pool.submit(self._fetch_marker, b)) for b in wanted]
        self._believed.update(b for b, future in fetched if future.exception() is None)
        fetched[0][1].result()

    def _fetch_marker(self, block: int) -> None:
        path, name = self.layout.marker(block), f"blocks/{block:06d}.json"
        at = int(np.searchsorted(self._records["block"], block))
        known = at < len(self._records) and self._records["block"][at] == block
        expected = int(self._records["marker_xxh3"][at]) if known else None
        if expected is not None and file_xxh3(path) == expected:
            return
        for _ in range(2):
            data = self._remote.find(name, limit=_SMALL)
            _bring(self.layout, path, data)
            if data is not None and expected in (None, xxhash.xxh3_64_intdigest(data)):
                return
        found = "no file" if data is None else xxhash.xxh3_64_hexdigest(data)
        expected_text = "a marker" if expected is None else f"xxh3 {hex64(expected)}"
        raise CorruptBlockError(self._remote.place(name), expected_text, found)

    def _fetch_shard(self, block: int) -> None:
        record, path = self._record(block), self.layout.shard(block)
        size, expected = int(record["shard_size"]), int(record["shard_xxh3"])
        part = self.layout.run / f"{path.name}.part"
        with locked(self.layout.run / f"fetch.{block % _LOCKS:02d}.lock"):
            if path.exists():
                return  # another rank was faster
            self._local.make_room(size)
            for _ in range(2):
                with locked(part):
                    found = self._download(path.name, part, size=size)
                    if found == hex64(expected):
                        os.replace(part, path)
                        return
                    part.unlink(missing_ok=True)
        raise CorruptBlockError(
            self._remote.place(path.name), f"{size} bytes, xxh3 {hex64(expected)}", found
        )

    def _download(self, name: str, part: Path, *, size: int) -> str:
        """The xxh3 of what was downloaded; in words what is wrong with its size."""
        there = self._remote.size(name)  # a huge object must not fill the disk before it is refused
        if there != size:
            return "no file" if there is None else f"{there} bytes"
        try:
            self._remote.download(name, part)
            found = part.stat().st_size
        except FileNotFoundError:
            return "no file"
        return hex64(file_xxh3(part) or 0) if found == size else f"{found} bytes"


def _reopened(url: str, local: LocalCopies) -> RemoteReader:
    return open_remote(url, local=local)


def _bring(layout: Layout, path: Path, data: bytes | None) -> None:
    """Make the mirror's file what the remote one is."""
    if data is None:
        path.unlink(missing_ok=True)
    elif not same_bytes(path, data):
        put(LOCAL, layout, path, data)


def _is(path: Path, expected: dict[str, Any]) -> bool:
    try:
        data = read_file(path, limit=int(expected["size"]))
    except (FileNotFoundError, CorruptBlockError):
        return False
    return xxhash.xxh3_64_hexdigest(data) == expected["xxh3"]
