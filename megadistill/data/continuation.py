"""Continuing a token store: which of its blocks stay, and where the next one begins.

The last sequences of a store are closed by the end of its corpus. Blocks with such sequences say in
their marker's `end` how many documents were read. With another `data.max_samples` they are made
again, and all of them are taken back before the first is: a mixture would pass for a whole store.
"""

from __future__ import annotations

import logging
from typing import Any

from megadistill.blocks import BlockReader, BlockWriter
from megadistill.config import DataConfig
from megadistill.data.packing.stream import Cursor
from megadistill.errors import RecipeError

log = logging.getLogger(__name__)


def covers(store: BlockReader, data: DataConfig) -> bool:
    """Whether all blocks are there for as many documents as are asked for."""
    blocks = store.committed()
    if not blocks or blocks[-1] != len(blocks) - 1:
        return False
    last = store.marker(blocks[-1])
    held = blocks[-1] * store.block_size + last["sequences"]
    end = last.get("end")
    return end is not None and end.get("sequences", held) == held and _lasts(end, data)


def _lasts(end: dict[str, Any], data: DataConfig) -> bool:
    """Whether the corpus of `data` ends where the blocks with this `end` were made."""
    read = end["documents_read"]
    if data.max_samples is None:
        return end["exhausted"]
    return read == data.max_samples or (end["exhausted"] and read < data.max_samples)


def lasting_blocks(store: BlockReader, data: DataConfig) -> list[int]:
    """The committed blocks that stay: not those that an earlier end of the corpus has closed."""
    blocks = store.committed()
    while blocks:
        end = store.marker(blocks[-1]).get("end")
        if end is None or _lasts(end, data):
            break
        blocks.pop()
    return blocks


def continue_from(store: BlockWriter | None, data: DataConfig) -> tuple[int | None, Cursor]:
    """(the block to go on with, where it begins); (None, ...) where none is missing.

    RecipeError where the store holds more documents than are asked for.
    """
    blocks = store.committed() if store is not None else []
    if store is None or not blocks:
        return 0, Cursor()
    require_no_fewer(store, data)
    if covers(store, data):
        return None, Cursor()
    if store.num_sequences is not None:
        store.plan(None)  # it may become longer
    blocks, lasting = store.committed(), lasting_blocks(store, data)
    # All of them before the first is done again: a mixture would pass for either store.
    store.retract(blocks[len(lasting) :])
    number = next((n for n, b in enumerate(lasting) if n != b), len(lasting))
    if number == 0:
        return 0, Cursor()
    log.info("%s: %d blocks are there, going on", data.dir, number)
    return number, Cursor(**store.marker(number - 1)["cursor"])


def require_no_fewer(store: BlockReader, data: DataConfig) -> None:
    """RecipeError where the store holds more documents than are asked for."""
    blocks = store.committed()
    if data.max_samples is None or not blocks:
        return
    last = store.marker(blocks[-1])
    held = last["end"]["documents_read"] if "end" in last else _documents_read(last)
    if held > data.max_samples:
        raise RecipeError(
            f"{data.dir}: holds the tokens of {held} documents, data.max_samples is "
            f"{data.max_samples}: set data.max_samples to {held} or more, or data.dir to another "
            "folder"
        )


def _documents_read(marker: dict[str, Any]) -> int:
    return marker.get("documents_read", marker["cursor"]["document"])
