"""Opening a store for reading, wherever it is: in a folder, or at a URL."""

from __future__ import annotations

from pathlib import Path

from megadistill.blocks.reader import BlockReader
from megadistill.blocks.remote.mirror_cache import open_remote
from megadistill.blocks.remote.shard_cache import LocalCopies
from megadistill.storage.disk import is_url


def open_store(path: str | Path, *, local: LocalCopies | None = None) -> BlockReader:
    """The store in a folder or at a URL, of either kind. StoreError, CorruptBlockError.

    local  where shards of a remote store are kept, see `blocks.remote.mirror_cache`
    """
    return open_remote(str(path), local=local) if is_url(path) else BlockReader.open(path)
