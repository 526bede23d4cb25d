"""Checks of a store that is there already, against the one that a run is to write.

They raise what `BlockWriter.create` and `BlockWriter.lock` raise, and write nothing: for a dry run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megadistill.blocks.anew import must_begin_anew, require_same_shape
from megadistill.blocks.layout import Layout, check_folder, new_header
from megadistill.blocks.opening import open_store
from megadistill.blocks.reader import BlockReader
from megadistill.blocks.recipe import Keys
from megadistill.storage.lock import PATIENCE_S, StoreLock


def find_existing(
    path: str | Path,
    *,
    kind: str,
    header: dict[str, Any],
    columns: dict[str, str],
    block_size: int,
    ids_bin: bytes | None = None,
    keys: Keys | None = None,
) -> BlockReader | None:
    """The store that `BlockWriter.create` with the same arguments resumes; None for a new one.

    Raises RecipeError for another recipe, StoreError for a folder that holds something else,
    LockedError where a store without blocks would begin anew and another run writes it.
    """
    if check_folder(Layout(Path(path)), kind) is None:
        return None
    store = open_store(path)
    full = new_header(header, kind=kind, columns=columns, block_size=block_size, ids_bin=ids_bin)
    if not store.present() and must_begin_anew(store.layout, store.header, full, ids_bin):
        require_unlocked(store)
        return None
    require_same_shape(store, full, keys)
    return store


def require_unlocked(store: BlockReader) -> None:
    """LockedError while another run writes the store. Takes no lock."""
    lock = StoreLock(store.layout.run / "lock", what=str(store.path), patience_s=PATIENCE_S)
    lock.require_free()
