"""Counts over a token store: documents, tokens without padding, how often each id occurs."""

from __future__ import annotations

from typing import Any

import numpy as np

from megadistill.blocks import BlockReader
from megadistill.blocks.padding import without_padding


def token_counts(store: BlockReader, blocks: list[int] | None = None) -> np.ndarray:
    """int64 [V]: how often each id occurs in the blocks, by default all. Reads them once."""
    vocab_size = store.recipe["tokenizer"]["vocab_size"]
    counts = np.zeros(vocab_size, dtype=np.int64)
    for block in store.committed() if blocks is None else blocks:
        for sample in store.block(block):
            counts += np.bincount(without_padding(sample), minlength=vocab_size)
    return counts


def count_tokens(store: BlockReader) -> int:
    """Tokens of all blocks, without padding. Reads the markers of a store with padding."""
    total = len(store) * store.recipe["seq_len"]
    if "padding" not in store.columns:
        return total
    markers = map(store.marker, store.committed())
    return total - sum(marker["statistics"]["padding_tokens"] for marker in markers)


def tokens_of_blocks(store: BlockReader, blocks: list[int]) -> dict[int, int]:
    """Tokens of each of the blocks, without padding. Reads their markers where there is padding."""
    size, seq_len = store.block_size, store.recipe["seq_len"]
    tokens = {b: min(size, len(store) - b * size) * seq_len for b in blocks}
    if "padding" in store.columns:
        for block in blocks:
            tokens[block] -= store.marker(block)["statistics"]["padding_tokens"]
    return tokens


def statistics(store: BlockReader) -> dict[str, int]:
    """The counts of all blocks together, and how the corpus ended."""
    total = {"sequences": len(store), "tokens": count_tokens(store)}
    end: dict[str, Any] = {}
    for block in store.committed():
        marker = store.marker(block)
        end = marker.get("end", {})
        for name, value in marker["statistics"].items():
            total[name] = total.get(name, 0) + value
    return total | {k: v for k, v in end.items() if k not in ("exhausted", "sequences")}
