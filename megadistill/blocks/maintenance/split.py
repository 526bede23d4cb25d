"""Splitting a store into parts that together are the whole: block b goes to part b mod n.

The way back is merging: the parts merged are the store again, byte for byte. Shards are shared on
disk where the file system can, so that a split costs next to no space.
"""

from __future__ import annotations

from pathlib import Path

from megadistill.blocks.maintenance.merge import gather, sound_blocks
from megadistill.blocks.maintenance.verify import CheckOf, no_check
from megadistill.blocks.reader import BlockReader
from megadistill.blocks.writer import BlockWriter
from megadistill.errors import StoreError
from megadistill.storage.files import LOCAL, Files


def split_store(
    store: BlockReader,
    out: str | Path,
    parts: int,
    *,
    check_of: CheckOf = no_check,
    workers: int = 1,
    show_progress: bool | None = False,
    files: Files = LOCAL,
) -> list[BlockWriter]:
    """The parts, in folders `out`.0 to `out`.(parts-1), each planned as the whole is.

    Every block is verified before it is given away. StoreError for a folder that is there already
    and for a number of parts that the blocks do not fill, CorruptBlockError for a damaged block.
    """
    blocks = store.committed()
    folders = [Path(f"{out}.{i}") for i in range(parts)]
    if not 2 <= parts <= len(blocks):
        raise StoreError(
            f"{store.path}: holds {len(blocks)} blocks, and cannot be split in {parts}: choose "
            f"from 2 to {len(blocks)} parts"
            if len(blocks) > 1
            else f"{store.path}: holds {len(blocks)} blocks, expected at least 2 to split"
        )
    for folder in folders:
        if folder.exists() or folder.is_symlink():
            raise StoreError(f"{folder}: exists already: remove it, or choose another --out")
    holders = {block: [store] for block in blocks}
    taken = sound_blocks(holders, check_of=check_of, workers=workers, show_progress=show_progress)
    return [
        gather(
            folder,
            store,
            {b: holder for b, holder in taken.items() if b % parts == number},
            total=store.num_sequences,
            what=folder.name,
            show_progress=show_progress,
            files=files,
        )
        for number, folder in enumerate(folders)
    ]
