"""Cost of writing the targets: generating with the writer on against off, in one process.

Both score the same blocks. On: each is handed to a CacheWriter, and the time runs until the last
block is durable, though a real run waits for its writer only once. Off: targets are dropped. The
two take turns, and change places from pair to pair, so that a machine that slows down or speeds up
meets both.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from megadistill.bench.rounds import ratio
from megadistill.blocks import open_store
from megadistill.cache.build import score
from megadistill.cache.cache_store import create_store
from megadistill.cache.writer import CacheWriter
from megadistill.config import Config
from megadistill.errors import StoreError
from megadistill.parallel import Mesh
from megadistill.teacher.engine import load_teacher


def writer_cost(config: Config, mesh: Mesh, *, pairs: int, blocks: int) -> dict[str, Any]:
    """The medians of `pairs` pairs over the first `blocks` blocks of the token store.

    Writes to a folder beside `cache.dir`'s name in the temporary folder (TMPDIR), and removes it.
    Raises StoreError where the token store has fewer blocks.
    """
    tokens = open_store(config.data.dir)
    if len(tokens.committed()) < blocks:
        raise StoreError(
            f"{tokens.path}: holds {len(tokens.committed())} blocks, expected at least {blocks}: "
            "set --blocks lower"
        )
    teacher = load_teacher(config, mesh, vocab_size=tokens.recipe["tokenizer"]["vocab_size"])
    folder = Path(tempfile.mkdtemp(prefix="megadistill-bench-"))
    samples = [tokens.block(block) for block in range(blocks)]

    def run(number: int, *, on: bool) -> float:
        cache = config.cache.model_copy(update={"dir": str(folder / str(number))})
        store = create_store(config.model_copy(update={"cache": cache}), tokens)
        size = store.block_size
        started = time.perf_counter()
        with CacheWriter(store) as writer:
            for block in range(blocks):
                targets = score(
                    config, teacher, samples[block], first=block * size, block_size=size
                )
                if on:
                    writer.submit(block, samples[block], targets)
        seconds = time.perf_counter() - started
        shutil.rmtree(store.path)
        return seconds

    try:
        run(0, on=True)
        times: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * pairs):
            on = number % 4 in (0, 3)
            times[on].append(run(number, on=on))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "method": config.targets.method,
        "pairs": pairs,
        "blocks": blocks,
        "positions": blocks * tokens.block_size * config.data.seq_len,
        "seconds_on": statistics.median(times[True]),
        "seconds_off": statistics.median(times[False]),
        **ratio(times[True], times[False]),
    }
