"""Measuring a run: a few blocks, for real, with this configuration on these ranks.

The corpus' first documents are tokenised, the teacher is loaded, and every copy of it scores
`blocks` blocks after a warm-up, encoded and written beside it as generating does. All of it lies in
a temporary folder (TMPDIR); the configured folders are neither read nor written. What is left out
of the pace: loading, tokenising, and the wait for the last block to be written.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megadistill.blocks import BlockWriter
from megadistill.blocks.padding import without_padding
from megadistill.cache.build import score
from megadistill.cache.cache_store import create_store
from megadistill.cache.disk_guard import block_bytes
from megadistill.cache.writer import CacheWriter
from megadistill.config import Config
from megadistill.data.sources.source import documents
from megadistill.data.tokens import build_tokens
from megadistill.parallel import Mesh
from megadistill.preflight.plan.sizes import Rates
from megadistill.teacher.engine import Teacher, load_teacher

CHARACTERS_A_TOKEN = 8  # at most, nearly: English has 4.2, code 3.5
SAMPLED_TOKENS = 1 << 23  # at most, unless one block has more: every rank is sent them

Samples = list[dict[str, Any]]


@dataclass(frozen=True)
class Measured:
    """Holds the measurements. Tokens are all positions, with targets or without."""

    ranks: int
    blocks: int  # scored, by all copies of the teacher together
    block_sequences: int
    tokens_per_s: float
    load_s: float
    entries_per_position: float
    bytes_per_position: float  # the targets column, over positions that have targets
    cache_bytes_a_token: float
    token_store_bytes_a_token: float

    @property
    def rates(self) -> Rates:
        """For runs of other sizes."""
        return Rates(self.token_store_bytes_a_token, self.cache_bytes_a_token, self.tokens_per_s)


@dataclass(frozen=True)
class _Sample:
    """Sample rank 0 broadcasts: blocks of sequences, and how a store of their cache is made."""

    blocks: list[Samples]
    bytes_a_token: float
    header: dict[str, Any]
    ids_bin: bytes | None


def measure(config: Config, mesh: Mesh, *, blocks: int = 2) -> Measured:
    """Score `blocks` blocks on each copy of the teacher. Collective over all ranks."""
    folder = Path(tempfile.mkdtemp(prefix="megadistill-plan-"))
    try:
        started = time.monotonic()
        sample = _sampled_together(_moved(config, folder), mesh, blocks * _copies(config, mesh))
        recipe = sample.header["recipe"]
        teacher = load_teacher(config, mesh, vocab_size=recipe["vocab_size"])
        load_s = time.monotonic() - started
        store = _store(folder / f"cache-{mesh.rank}", sample)
        _warm_up(config, teacher, sample.blocks[0])
        mesh.barrier()
        sums = mesh.sum(_run(config, mesh, teacher, store, sample, blocks))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    pace, tokens, size, written, positions, entries, targets = sums.tolist()
    return Measured(
        ranks=mesh.world,
        blocks=round(written),
        block_sequences=len(sample.blocks[0]),
        tokens_per_s=pace,
        load_s=load_s,
        entries_per_position=entries / max(1, positions),
        bytes_per_position=targets / max(1, positions),
        cache_bytes_a_token=size / tokens,
        token_store_bytes_a_token=sample.bytes_a_token,
    )


def _copies(config: Config, mesh: Mesh) -> int:
    return mesh.world if config.teacher.engine == "zero3" else mesh.dp


def _moved(config: Config, folder: Path) -> Config:
    """The configuration with its stores in `folder`."""
    data = config.data.model_copy(update={"dir": str(folder / "tokens")})
    cache = config.cache.model_copy(update={"dir": str(folder / "cache")})
    return config.model_copy(update={"data": data, "cache": cache})


def _sampled_together(config: Config, mesh: Mesh, blocks: int) -> _Sample:
    """Returns rank 0's sample on every rank."""
    found: list[_Sample] = []
    # Waiting for rank 0 may take long, and what it found is too large for the key-value store.
    mesh.run_on_rank0(lambda: found.append(_sample(config, blocks)))
    return mesh.broadcast(found[0] if found else None)


def _sample(config: Config, blocks: int) -> _Sample:
    """At most `blocks` different blocks of the corpus' beginning, through stores of config's."""
    a_block = config.data.block_size * config.data.seq_len
    blocks = max(1, min(blocks, SAMPLED_TOKENS // a_block))
    wanted = (blocks * a_block + config.data.seq_len) * CHARACTERS_A_TOKEN
    data = config.data.model_copy(update={"max_samples": _documents_of(config, wanted)})
    tokens = build_tokens(config.model_copy(update={"data": data}), progress=False)
    cache = create_store(config, tokens)
    taken = tokens.committed()[:blocks]
    sequences = [tokens.block(b) for b in taken]
    length = sum(_num_tokens(block) for block in sequences)
    return _Sample(
        blocks=[[_content(s) for s in block] for block in sequences],
        bytes_a_token=sum(block_bytes(tokens, b) for b in taken) / length,
        header=cache.header,
        ids_bin=cache.ids_bin(),
    )


def _documents_of(config: Config, characters: int) -> int:
    """How many documents, from the first on, have so many characters; all, where they have less."""
    number = 0
    for number, document in enumerate(documents(config.data), 1):  # noqa: B007 - used after it
        # Pieces enough for the rest: a document may be larger than memory.
        characters -= sum(unit.characters for unit in islice(document.units(0), 64))
        if characters <= 0:
            break
    return max(1, number)


def _num_tokens(samples: Samples) -> int:
    return sum(len(without_padding(s)) for s in samples)


def _content(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name != "sum"}


def _store(path: Path, sample: _Sample) -> BlockWriter:
    """A store of this rank's own, on this host, like the one that generating would write."""
    return BlockWriter.create(
        path,
        kind="cache",
        header=sample.header,
        columns=sample.header["columns"],
        block_size=sample.header["block_size"],
        ids_bin=sample.ids_bin,
    )


def _warm_up(config: Config, teacher: Teacher, samples: Samples) -> None:
    size = config.teacher.micro_batch
    score(config, teacher, samples[:size], first=0, block_size=size)


def _run(
    config: Config, mesh: Mesh, teacher: Teacher, store: BlockWriter, sample: _Sample, blocks: int
) -> torch.Tensor:
    """[7], of ranks that write: tokens/s, tokens, bytes, blocks, positions, entries, targets."""
    copy = mesh.rank if teacher.lockstep else mesh.dp_rank
    size = store.block_size
    tokens, started = 0, time.monotonic()
    with CacheWriter(store) as writer:
        for number in range(blocks):
            samples = sample.blocks[(copy * blocks + number) % len(sample.blocks)]
            targets = score(config, teacher, samples, first=number * size, block_size=size)
            if mesh.tp_rank == 0:
                writer.submit(number, samples, targets)
                tokens += _num_tokens(samples)
        seconds = time.monotonic() - started
    counted = [store.marker(b)["statistics"] for b in store.committed()]
    found = [
        tokens / seconds,
        tokens,
        sum(block_bytes(store, b) for b in store.committed()),
        len(counted),
        *(sum(s[name] for s in counted) for name in ("positions", "entries", "bytes")),
    ]
    return torch.tensor(found, dtype=torch.float64)
