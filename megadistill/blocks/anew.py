"""A store without blocks begins anew with other settings: the one case in which a header changes.

Nothing depends on the header of a store without blocks, and a run that died before its first commit
should not fix the settings of the next one. Under the lock, since a living run may be about to
commit. Everything but the header is removed first, and the header goes before the new one is
written: a crash in between leaves a folder that can become a store.
"""

from __future__ import annotations

import logging
from typing import Any

from megadistill.blocks.install import temporary_folder
from megadistill.blocks.layout import Layout, same_bytes
from megadistill.blocks.reader import BlockReader
from megadistill.blocks.recipe import (
    NAMES,
    Keys,
    differences,
    require_same_recipe,
    shown_differences,
)
from megadistill.storage.files import Files
from megadistill.storage.records import encode_json, put_file

log = logging.getLogger(__name__)

# Of a header: what two runs of one store must agree on.
_SHAPE = ("recipe", "block_size", "columns", "ids_bin")


def shape_of(header: dict[str, Any]) -> dict[str, Any]:
    """The part of a header that two runs of one store must agree on."""
    return {key: header[key] for key in _SHAPE if key in header}


def write_header(
    files: Files, layout: Layout, kind: str, header: dict[str, Any], ids_bin: bytes | None
) -> None:
    """Write ids.bin and then the header of a store that has neither."""
    temporary = temporary_folder(files, layout)
    try:
        if ids_bin is not None:
            put_file(files, layout.ids_bin, ids_bin, temporary=temporary / "ids")
        data = encode_json(header)
        put_file(files, layout.header(kind), data, temporary=temporary / "header")
    finally:
        files.remove_tree(temporary)


def must_begin_anew(
    layout: Layout, held: dict[str, Any], header: dict[str, Any], ids_bin: bytes | None
) -> bool:
    """Whether a store with the header `held` is not the one that `header` and ids.bin announce."""
    damaged = ids_bin is not None and not same_bytes(layout.ids_bin, ids_bin)
    return damaged or any(differences(shape_of(held), shape_of(header)))


def require_same_shape(store: BlockReader, header: dict[str, Any], keys: Keys | None) -> None:
    """RecipeError, naming the keys, where a store has another header than the one asked for."""
    require_same_recipe(
        shape_of(store.header),
        shape_of(header),
        file=str(store.layout.header(store.kind)),
        other="this run's is",
        keys=keys or Keys(),
        names=(store.names, header.get(NAMES, {})),
    )


def replace_header(
    files: Files, layout: Layout, kind: str, header: dict[str, Any], ids_bin: bytes | None
) -> None:
    """Give a store without blocks another header. The caller holds the store's lock."""
    for path in (layout.plan, layout.blocks_bin, layout.index):
        files.unlink(path)
    files.fsync_dir(layout.path)  # before the header is gone: a plan alone is no store
    files.unlink(layout.header(kind))
    files.fsync_dir(layout.path)
    write_header(files, layout, kind, header, ids_bin)


def log_begun_anew(layout: Layout, held: dict[str, Any], header: dict[str, Any]) -> None:
    """Log the settings in which a new header differs from the one it replaced."""
    different = list(differences(shape_of(held), shape_of(header)))
    if different:
        log.warning(
            "%s: holds no block yet: begun anew with other settings: %s",
            layout.path,
            shown_differences(different),
        )
