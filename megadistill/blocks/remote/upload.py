"""Copying a store to a URL, from one, or between folders: how remote caches are made.

At a URL there is no rename, so object names are final and the order makes up for it: header and
plan, then of each block the shard and after it the marker, the derived files last. A copy that was
interrupted resumes: a block whose marker is there, byte for byte, with a shard of the right size
beside it, was sent whole, and is not sent again. `verify` reads back what is there as well, and
sends again what has another xxh3.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.blocks.derived import encode_blocks_bin, encode_index
from megadistill.blocks.install import is_installed
from megadistill.blocks.layout import MARKER_NAME
from megadistill.blocks.opening import open_store
from megadistill.blocks.reader import BlockReader
from megadistill.blocks.remote.object_store import Remote
from megadistill.blocks.remote.shard_cache import LocalCopies, file_xxh3
from megadistill.blocks.writer import BlockWriter
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.storage.disk import is_url
from megadistill.storage.files import read_file
from megadistill.storage.records import encode_json, hex64

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Copied:
    """Blocks that were sent, and blocks that were there already."""

    sent: int
    there: int


def copy_store(
    source: str | Path,
    dest: str | Path,
    *,
    verify: bool = False,
    workers: int = 4,
    progress: Progress | None = None,
    local: LocalCopies | None = None,
) -> Copied:
    """Make `dest`, a folder or a URL, the same store as `source`, byte for byte.

    verify    read back every shard at `dest`; a local folder's are always read
    workers   shards sent at a time
    progress  called with each block's number when it is there
    Raises StoreError where `dest` holds something else, CorruptBlockError for a damaged source.
    """
    store = open_store(source, local=local)
    if is_url(dest):
        return _upload(store, Remote(str(dest)), verify=verify, workers=workers, progress=progress)
    return _to_folder(store, dest, progress=progress)


def _to_folder(store: BlockReader, dest: str | Path, *, progress: Progress | None) -> Copied:
    out = BlockWriter.create_like(dest, store)
    sent = there = 0
    with out.lock():
        out.clean()
        if store.num_sequences is not None:
            out.plan(store.num_sequences)
        for block in store.committed():
            marker = store.marker(block)
            if is_installed(out.layout, block, marker=marker, data=encode_json(marker)):
                there += 1
            else:
                out.adopt(block, store)
                sent += 1
            if progress:
                progress(block)
        out.finish()
    return Copied(sent, there)


def _upload(
    store: BlockReader, remote: Remote, *, verify: bool, workers: int, progress: Progress | None
) -> Copied:
    _claim(store, remote)
    markers = {block: store.marker(block) for block in store.committed()}
    upload = _Upload(store, remote, verify=verify)
    upload.require_no_others(markers)
    sent = 0
    with ThreadPoolExecutor(workers) as pool:
        futures = [(block, pool.submit(upload.block, m)) for block, m in markers.items()]
        try:
            for block, future in futures:
                sent += future.result()
                if progress:
                    progress(block)
        finally:
            pool.shutdown(cancel_futures=True)
    ordered = list(markers.values())
    _put(remote, "blocks.bin", encode_blocks_bin(ordered))
    _put(remote, "index.json", encode_index(ordered, store.parsed_columns))
    return Copied(sent, len(markers) - sent)


class _Upload:
    """Blocks on their way to a URL, and what was there before."""

    def __init__(self, store: BlockReader, remote: Remote, *, verify: bool) -> None:
        self._store, self._remote, self._verify = store, remote, verify
        self._shards = remote.sizes()
        self._markers = {name for name in remote.sizes("blocks") if MARKER_NAME.fullmatch(name)}

    def require_no_others(self, markers: dict[int, dict[str, Any]]) -> None:
        """StoreError where the URL has blocks that the source has not."""
        others = sorted(self._markers - {f"{block:06d}.json" for block in markers})
        if others:
            raise StoreError(
                f"{self._remote.name}: holds {len(others)} blocks that {self._store.name} has not "
                f"(blocks/{others[0]}): merge the two in a local folder, and copy that to an "
                "empty place"
            )

    def block(self, marker: dict[str, Any]) -> bool:
        """Bring a block to the URL; whether it had to be sent."""
        remote, name, size = self._remote, marker["shard"]["file"], marker["shard"]["size"]
        marker_name = f"blocks/{marker['block']:06d}.json"
        if marker_name.removeprefix("blocks/") in self._markers:
            sound = (
                remote.find(marker_name, limit=1 << 26) == encode_json(marker)
                and self._shards.get(name) == size
                and (not self._verify or _reads_back(remote, marker))
            )
            if sound:
                return False
            # The marker goes before its shard is replaced, and what is derived before the marker.
            remote.remove("blocks.bin")
            remote.remove(marker_name)
        with self._store.shard_file(marker["block"]) as path:
            found = hex64(file_xxh3(path) or 0)
            if found != marker["shard"]["xxh3"]:
                raise CorruptBlockError(str(path), f"xxh3 {marker['shard']['xxh3']}", found)
            remote.upload(path, name)
        there = remote.size(name)
        if there != size or (self._verify and not _reads_back(remote, marker)):
            what = "other bytes" if there == size else f"{there} bytes"
            raise StoreError(f"{remote.place(name)}: sent {size} bytes, found {what}: run again")
        remote.write(marker_name, encode_json(marker))
        return True


def _claim(store: BlockReader, remote: Remote) -> None:
    """Begin a store at the URL, or see that it is this one."""
    name = store.layout.header(store.kind).name
    header = read_file(store.layout.header(store.kind), limit=1 << 24)
    there = remote.find(name, limit=1 << 24)
    # A copy that was interrupted may have left the beginning of the header.
    if there is not None and not header.startswith(there):
        raise StoreError(f"{remote.place(name)}: is another store's: choose another place")
    if there is None:
        others = sorted(remote.sizes().keys() - {"ids.bin"})
        if others:
            raise StoreError(
                f"{remote.name}: holds {others[0]} but no {name}: choose an empty place"
            )
    remote.make_folder("blocks")
    ids = store.ids_bin()
    if ids is not None:
        _put(remote, "ids.bin", ids)
    _put(remote, name, header)
    if store.num_sequences is not None:
        _put(remote, "plan.json", read_file(store.layout.plan, limit=1 << 16))


def _put(remote: Remote, name: str, data: bytes) -> None:
    if remote.size(name) != len(data) or remote.find(name, limit=len(data)) != data:
        remote.write(name, data)


def _reads_back(remote: Remote, marker: dict[str, Any]) -> bool:
    """Whether the shard at the URL has the marker's xxh3: it is downloaded and dropped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        try:
            remote.download(marker["shard"]["file"], path)
        except FileNotFoundError:
            return False
        return hex64(file_xxh3(path) or 0) == marker["shard"]["xxh3"]
