"""Ranking of token ids: frequent tokens get small numbers, and small numbers cost few bits.

Made from the counts in the token store, before the teacher runs, and kept beside the cache as
ids.bin. It changes no target, only what an id costs.

    ids.bin: "MDIDRANK" | uint32 version | uint32 V | uint32 ids [V], the most frequent first

Shape letter: V vocabulary.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from megadistill.blocks import BlockReader
from megadistill.data.counts import token_counts
from megadistill.errors import CorruptBlockError

_HEAD = struct.Struct("<8sII")
_MAGIC, _VERSION = b"MDIDRANK", 1
# Blocks of tokens to count: 64 of 256 sequences of 2,048 tokens are 34 million, some seconds, and
# rank the vocabulary as all of them would.
_COUNTED_BLOCKS = 64


class IdRanking:
    """A permutation of the vocabulary: `ids[r]` has rank r, `ranks[i]` is the rank of id i."""

    def __init__(self, ids_V: np.ndarray) -> None:
        self.ids = np.asarray(ids_V, np.int64)
        self.ranks = np.empty(len(self.ids), np.int64)
        self.ranks[self.ids] = np.arange(len(self.ids))
        self._on_device: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def ids_like(self, other: Any) -> Any:
        """Returns `ids` like `other`: numpy, or a torch tensor on its device, copied there once."""
        if isinstance(other, np.ndarray):
            return self.ids
        import torch

        if other.device not in self._on_device:
            self._on_device[other.device] = torch.as_tensor(self.ids, device=other.device)
        return self._on_device[other.device]

    @classmethod
    def from_counts(cls, counts_V: np.ndarray) -> IdRanking:
        """Ranks by falling count; equal counts by rising id."""
        return cls(np.argsort(-counts_V, kind="stable"))

    def to_bytes(self) -> bytes:
        """Returns the bytes of ids.bin."""
        return _HEAD.pack(_MAGIC, _VERSION, len(self)) + self.ids.astype("<u4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, *, vocab_size: int, file: str) -> IdRanking:
        """Decodes the bytes of `to_bytes`. CorruptBlockError for anything else."""
        if len(data) != _HEAD.size + 4 * vocab_size:
            raise CorruptBlockError(file, f"a ranking of {vocab_size} ids", f"{len(data)} bytes")
        if _HEAD.unpack_from(data) != (_MAGIC, _VERSION, vocab_size):
            raise CorruptBlockError(file, f"version {_VERSION} of ids.bin", data[:16].hex())
        ids = np.frombuffer(data, "<u4", offset=_HEAD.size).astype(np.int64)
        if not np.array_equal(np.sort(ids), np.arange(vocab_size)):
            raise CorruptBlockError(file, "every id once", "others")
        return cls(ids)


def ranking_of(store: BlockReader, *, vocab_size: int) -> IdRanking | None:
    """Returns the ranking that a cache was made with, or None. Raises CorruptBlockError."""
    data = store.ids_bin()
    if data is None:
        return None
    return IdRanking.from_bytes(data, vocab_size=vocab_size, file=str(store.layout.ids_bin))


def rank_ids(tokens: BlockReader, *, vocab_size: int) -> IdRanking:
    """Returns the ranking for a teacher of `vocab_size` ids over this text."""
    blocks = tokens.committed()
    step = -(-len(blocks) // _COUNTED_BLOCKS)
    counts = token_counts(tokens, blocks[::step])
    return IdRanking.from_counts(np.pad(counts, (0, vocab_size - len(counts))))
