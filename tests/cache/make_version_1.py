"""Make the stores of tests/cache/version_1.

    python -m tests.cache.make_version_1 FOLDER

A token store and a cache of every method, of format version 1, and in `expected.json` what reading
them must give for as long as version 1 is read. They are made once, and committed: run this only
for a new version, into a new folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megadistill.blocks import open_store
from megadistill.cache.ranking import IdRanking
from megadistill.cache.reader import open_cache
from tests.blocks.stores import fill, make_samples
from tests.cache.caches import VOCAB_SIZE, fill_cache
from tests.cache.targets import METHODS

SEQUENCES = 7  # a full block, and one that is not
FIELDS = ("offsets", "ids", "weights", "tail", "heads", "truth_added", "entropy", "nll")


def make(folder: Path) -> None:
    fill(folder / "tokens", make_samples(SEQUENCES))
    ranking = IdRanking.from_counts(np.random.default_rng(1).integers(0, 1000, VOCAB_SIZE))
    for method in METHODS:
        fill_cache(
            folder / method,
            total=SEQUENCES,
            method=method,
            ids_bin=ranking.to_bytes() if method in ("varopt", "topk") else None,
        )
    for run in folder.glob("*.run"):
        shutil.rmtree(run)
    expected = {store.name: read(store) for store in sorted(folder.iterdir())}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Every sequence of a store in what JSON has: a float32 comes back from its shortest form."""
    if path.name not in METHODS:
        store = open_store(path)
        return [values(store[i], ("tokens", "documents")) for i in range(len(store))]
    return [
        values(sample, ("tokens", "documents")) | values(vars(sample["targets"]), FIELDS)
        for sample in open_cache(path)
    ]


def values(columns: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: [None if value != value else value for value in columns[name].tolist()]
        for name in names
        if columns[name] is not None
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]))
