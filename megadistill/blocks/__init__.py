"""Block stores: directories of MDS shards, committed block by block, verified on reading."""

from megadistill.blocks.opening import open_store
from megadistill.blocks.reader import BlockReader
from megadistill.blocks.writer import BlockWriter

__all__ = ["BlockReader", "BlockWriter", "open_store"]
