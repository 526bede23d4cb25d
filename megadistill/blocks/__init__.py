"""Block stores: directories of MDS shards, committed block by block, verified on reading."""

from megadistill.blocks.store import BlockStore

__all__ = ["BlockStore"]
