"""Make the stores of tests/cache/padding.

    python -m tests.cache.make_padding FOLDER

A token store and a cache of every method whose sequences end in padding (the feature flag
`padding`), and in `expected.json` what reading them must give for as long as the flag is read. They
are made once, and committed.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megadistill.blocks import BlockWriter
from megadistill.cache.ranking import IdRanking
from megadistill.cache.writer import CacheWriter
from megadistill.targets import SparseTargets
from tests.blocks.stores import BLOCK_SIZE, COLUMNS, SEQ_LEN, create, make_samples
from tests.cache.caches import VOCAB_SIZE
from tests.cache.make_version_1 import SEQUENCES, read
from tests.cache.targets import METHODS, make_targets

PADDED = {**COLUMNS, "padding": "uint64"}


def padded_samples() -> list[dict[str, Any]]:
    """Samples whose padding is 0, 1, 2, ... tokens of id 0."""
    samples = make_samples(SEQUENCES)
    for padding, sample in enumerate(samples):
        begin = SEQ_LEN - padding
        sample["tokens"][begin:] = 0
        starts = sample["documents"][sample["documents"] < begin]
        sample["documents"] = np.append(starts, begin)[: len(starts) + (padding > 0)]
        sample["documents"] = sample["documents"].astype(np.uint32)
        sample["padding"] = np.uint64(padding)
    return samples


def padded_targets(method: str, sequence: int, padding: int) -> SparseTargets:
    """make_targets without those of the padding."""
    t = make_targets(method, positions=SEQ_LEN, vocab_size=VOCAB_SIZE, seed=sequence)
    end = SEQ_LEN - padding
    stop, has = int(t.offsets[end]), np.arange(SEQ_LEN) < end
    return replace(
        t,
        offsets=np.minimum(t.offsets, stop),
        ids=t.ids[:stop],
        weights=t.weights[:stop],
        tail=np.where(has, t.tail, 0).astype(np.float32),
        heads=None if t.heads is None else np.where(has, t.heads, 0),
        truth_added=None if t.truth_added is None else t.truth_added & has,
    )


def make(folder: Path) -> None:
    samples = padded_samples()
    blocks = range(0, SEQUENCES, BLOCK_SIZE)
    store = create(folder / "tokens", columns=PADDED)
    store.plan(SEQUENCES)
    for first in blocks:
        part = samples[first : first + BLOCK_SIZE]
        counted = {"documents": len(part), "padding_tokens": int(sum(s["padding"] for s in part))}
        store.commit(first // BLOCK_SIZE, part, statistics=counted, cursor={"document": first})
    store.finish()
    ranking = IdRanking.from_counts(np.random.default_rng(1).integers(0, 1000, VOCAB_SIZE))
    for method in METHODS:
        cache = create_padded_cache(
            folder / method, method, ranking.to_bytes() if method in ("varopt", "topk") else None
        )
        with CacheWriter(cache, made_with={"torch": "2.13.0"}) as writer:
            for first in blocks:
                numbers = range(first, min(first + BLOCK_SIZE, SEQUENCES))
                targets = [padded_targets(method, i, int(samples[i]["padding"])) for i in numbers]
                writer.submit(first // BLOCK_SIZE, [samples[i] for i in numbers], targets)
        cache.finish()
    for run in folder.glob("*.run"):
        shutil.rmtree(run)
    expected = {path.name: read_padded(path) for path in sorted(folder.iterdir())}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def create_padded_cache(path: Path, method: str, ids_bin: bytes | None) -> BlockWriter:
    recipe = {
        "method": method,
        "tau": 0.06,
        "temperature": 0.7,
        "vocab_size": VOCAB_SIZE,
        "teacher": {"architecture": "Llama", "weights": "9f8e"},
        "tokenizer": {"vocab_size": VOCAB_SIZE, "xxh3": "1a2b"},
        "seq_len": SEQ_LEN,
    }
    cache = BlockWriter.create(
        path,
        kind="cache",
        header={"recipe": recipe},
        columns={**PADDED, "targets": "bytes"},
        block_size=BLOCK_SIZE,
        ids_bin=ids_bin,
    )
    cache.plan(SEQUENCES)
    return cache


def read_padded(path: Path) -> list[dict[str, Any]]:
    store = BlockWriter.open(path)
    padding = [{"padding": int(store[i]["padding"])} for i in range(len(store))]
    return [a | b for a, b in zip(read(path), padding, strict=True)]


if __name__ == "__main__":
    make(Path(sys.argv[1]))
