"""Small stores for tests: what fills them is a function of the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megadistill.blocks import BlockWriter, open_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.errors import StoreError
from megadistill.storage.records import encode_json, read_json

SEQ_LEN, BLOCK_SIZE = 8, 4
COLUMNS = {"tokens": f"ndarray:uint32:{SEQ_LEN}", "documents": "ndarray:uint32"}
RECIPE = {"seq_len": SEQ_LEN, "tokenizer": "9f8e", "source": {"name": "corpus", "seed": 0}}


def make_samples(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": rng.integers(0, 1000, SEQ_LEN, dtype=np.uint32),
            "documents": np.unique(np.append(rng.integers(1, SEQ_LEN, i % 3), 0)).astype(np.uint32),
        }
        for i in range(count)
    ]


def create(path: Path, **changes: Any) -> BlockWriter:
    settings = {
        "kind": "tokens",
        "header": {"recipe": RECIPE},
        "columns": COLUMNS,
        "block_size": BLOCK_SIZE,
    }
    return BlockWriter.create(path, **(settings | changes))


def commit(store: BlockWriter, block: int, samples: list[dict[str, Any]]) -> dict[str, Any]:
    part = samples[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
    return store.commit(block, part, statistics={"documents": len(part)}, cursor={"row": block})


def fill(
    path: Path, samples: list[dict[str, Any]], *, order: list[int] | None = None, **changes: Any
) -> BlockWriter:
    """A complete store of the samples, its blocks committed in `order`."""
    store = create(path, **changes)
    store.plan(len(samples))
    for block in order if order is not None else store.missing():
        commit(store, block, samples)
    store.finish()
    return store


def tree(path: Path) -> dict[str, bytes]:
    """Relative name to bytes of every file below a folder."""
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def same_sample(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two samples have equal columns, leaving `sum` aside."""
    keys = (left.keys() | right.keys()) - {"sum"}
    return all(k in left and k in right and np.array_equal(left[k], right[k]) for k in keys)


def read_all(path: Path, samples: list[dict[str, Any]]) -> None:
    """Every sample, compared with what was written. One of our errors, or all is right."""
    store = open_store(path)
    for index in range(len(store)):
        assert same_sample(store[index], samples[index])


def is_noticed(path: Path, samples: list[dict[str, Any]]) -> bool:
    """Whether verifying tells of damage. Reading may only err, or return the right samples."""
    try:
        read_all(path, samples)
        return bool(verify_store(open_store(path)))
    except StoreError:
        return True


def forge(file: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file and give it a right checksum, as an attacker would."""
    record = {k: v for k, v in read_json(file).items() if k != "xxh3"}
    change(record)
    file.write_bytes(encode_json(record))
