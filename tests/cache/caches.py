"""Small caches for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megadistill.blocks import BlockWriter
from megadistill.cache.writer import CacheWriter
from tests.blocks.stores import BLOCK_SIZE, COLUMNS, SEQ_LEN, make_samples
from tests.cache.targets import make_targets

VOCAB_SIZE = 1000


def create_cache(
    path: Path, *, method: str = "varopt", ids_bin: bytes | None = None, **recipe: Any
) -> BlockWriter:
    return BlockWriter.create(
        path,
        kind="cache",
        header={
            "recipe": {
                "method": method,
                "tau": 0.06,
                "temperature": 0.7,
                "teacher": {"architecture": "Llama", "weights": "9f8e"},
                "tokenizer": {"vocab_size": VOCAB_SIZE, "xxh3": "1a2b"},
                "vocab_size": VOCAB_SIZE,
                "seq_len": SEQ_LEN,
                **recipe,
            }
        },
        columns={**COLUMNS, "targets": "bytes"},
        block_size=BLOCK_SIZE,
        ids_bin=ids_bin,
    )


def block_of(block: int, *, total: int, method: str = "varopt") -> tuple[list, list]:
    """(samples, targets) of a block of a cache of `total` sequences."""
    numbers = range(block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, total))
    samples = make_samples(total)
    targets = [
        make_targets(method, positions=SEQ_LEN, vocab_size=VOCAB_SIZE, seed=i) for i in numbers
    ]
    return [samples[i] for i in numbers], targets


def fill_cache(
    path: Path,
    *,
    total: int = 10,
    blocks: list[int] | None = None,
    method: str = "varopt",
    torch: str = "2.13.0",
    ids_bin: bytes | None = None,
    **recipe: Any,
) -> BlockWriter:
    store = create_cache(path, method=method, ids_bin=ids_bin, **recipe)
    store.plan(total)
    with CacheWriter(store, made_with={"torch": torch}) as writer:
        for block in store.missing() if blocks is None else blocks:
            writer.submit(block, *block_of(block, total=total, method=method))
    store.finish()
    return store
