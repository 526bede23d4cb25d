"""The token store: a corpus, tokenised and packed, block by block, by several processes.

    documents -> batches of bounded text -> tokenising processes -> stream -> blocks -> store

The processes' answers are taken in the order of the batches, and a block's bytes depend on the
corpus alone, so any number of processes writes the same store. Every marker says where in the
corpus the next block begins: a run that was killed continues there. When `data.max_samples` grows,
the blocks with sequences that the corpus' end has closed are made again, and no other.
Memory: one block of tokens, a window of `best_fit`, two batches a process, and what the source
holds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from megadistill.blocks import BlockReader, BlockWriter
from megadistill.config import Config, DataConfig
from megadistill.data.continuation import continue_from, covers, lasting_blocks
from megadistill.data.corpus_progress import CorpusProgress
from megadistill.data.counts import statistics
from megadistill.data.encode import EncoderSpec, Unit
from megadistill.data.packing.best_fit import BestFit
from megadistill.data.packing.in_order import InOrder
from megadistill.data.packing.stream import Block, Cursor, Stream
from megadistill.data.skipped import Skipped
from megadistill.data.sources.source import count_documents, documents, source_version
from megadistill.data.token_plan import plan_tokens
from megadistill.data.workers import InProcess, Workers
from megadistill.errors import BadDocumentError, DataError
from megadistill.models.packed_sequences import Sequence

log = logging.getLogger(__name__)

# A tokenizer holds some 100 bytes for each token under way, and a character can be a token.
BATCH_CHARACTERS = 128 * 1024
BATCH_UNITS = 1024
PADDING, MANY = 0.1, 100  # share of positions, and sequences, from which the log advises
LITTLE = 0.01  # learned tokens of all tokens, below which the log says so


def build_tokens(
    config: Config, *, blocks: int | None = None, progress: bool | None = None
) -> BlockReader:
    """The token store of `config.data`, made or continued as far as needed.

    A complete store is returned as it is. `blocks`: so many are enough, of a corpus whose end is
    nowhere near; the store is complete only where the corpus ended before. `progress`: a bar; by
    default where there is a terminal.
    Raises DataError for a corpus that is missing, empty or, packed in order, shorter than a
    sequence (nothing is written), ConfigError for its tokenizer, RecipeError and StoreError for
    what is at `data.dir`.
    """
    planned = plan_tokens(config)
    data, spec, settings = planned.data, planned.spec, planned.settings
    with ExitStack() as stack:
        store = None
        if planned.is_begun:
            store = BlockWriter.create(data.dir, **settings)
            if holds_enough(store, data, blocks):
                return store
            _lock(store, stack)
        number, cursor = continue_from(store, data)
        made_with = source_version(data)
        run = CorpusRun(data, open_stream(settings, spec, number or 0, cursor), cursor, progress)
        if number is not None:
            workers = stack.enter_context(Workers(spec, count=_cores(data)))
            log.info("%s: tokenising in %d processes", data.dir, _cores(data))
            ahead = set() if store is None else {b for b in store.committed() if b > number}
            for block in run.blocks(workers):
                if store is None:  # not before there is something to write
                    store = BlockWriter.create(data.dir, **settings)
                    _lock(store, stack)
                _commit(store, block, made_with)
                run.skipped.write()
                if blocks is not None and len(store.committed()) >= blocks and not ahead:
                    return store
                if ahead and covers(store, data):
                    break  # a gap is closed
        run.skipped.write()
        if store is None or not covers(store, data):
            raise DataError(too_short(data, run))
        check_learned(statistics(store), name=str(store.path))
        store.plan(len(store))
        store.finish()
    _report(store)
    return store


def holds_enough(store: BlockReader, data: DataConfig, blocks: int | None) -> bool:
    """Whether a token store is complete, or has its first `blocks` blocks."""
    if covers(store, data) and store.complete():
        return True
    return blocks is not None and set(range(blocks)) <= set(lasting_blocks(store, data))


def open_stream(settings: dict[str, Any], spec: EncoderSpec, number: int, cursor: Cursor) -> Stream:
    """The stream of a token store from block `number` on. settings: of `TokenPlan`."""
    recipe = settings["header"]["recipe"]
    packing = recipe.get("packing")
    shape = {
        "seq_len": recipe["seq_len"],
        "block_size": settings["block_size"],
        "begin": [] if packing is None or spec.bos is None else [spec.bos],
        "number": number,
        "cursor": cursor,
    }
    if packing == "best_fit":
        return BestFit(filler=spec.eos, **shape)
    return InOrder(isolate=recipe["pack"] == "isolate", **shape)


class CorpusRun:
    """Run over the corpus, from a cursor on."""

    def __init__(
        self, data: DataConfig, stream: Stream, cursor: Cursor, progress: bool | None
    ) -> None:
        self.data, self.stream, self.cursor = data, stream, cursor
        self.read = cursor.document  # documents read, with those of earlier runs
        self.progress = progress
        self.skipped = Skipped(data.dir)

    def blocks(self, workers: Workers | InProcess) -> Iterator[Block]:
        total = count_documents(self.data)
        bar = CorpusProgress(total=total, done=self.cursor.document, show=self.progress)
        with bar:
            for units, encoded in workers.encode(_batches(self._units())):
                self._note_problems(units)
                self.stream.add(units, *encoded)
                bar.add(sum(unit.last for unit in units), tokens=int(encoded[1].sum()))
                yield from self.stream.full()
        limit = self.data.max_samples
        yield from self.stream.last(exhausted=limit is None or self.read < limit)

    def _note_problems(self, units: list[Unit]) -> None:
        for unit in units:
            if unit.problem is None:
                continue
            if self.data.on_bad_document == "error":
                raise BadDocumentError(
                    f"{unit.place}: {unit.problem}; data.on_bad_document=skip leaves such "
                    "documents out"
                )
            self.skipped.add(unit)

    def _units(self) -> Iterator[Unit]:
        start = self.cursor.document
        for number, document in enumerate(documents(self.data, start), start):
            self.read = number + 1
            for unit in document.units(number):
                if number > start or unit.piece >= self.cursor.piece:
                    yield unit


def _batches(units: Iterator[Unit]) -> Iterator[list[Unit]]:
    batch: list[Unit] = []
    characters = 0
    for unit in units:
        batch.append(unit)
        characters += unit.characters
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_UNITS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _cores(data: DataConfig) -> int:
    return data.workers or min(16, len(os.sched_getaffinity(0)))


def _lock(store: BlockWriter, stack: ExitStack) -> None:
    stack.enter_context(store.lock())
    store.clean()


def _commit(store: BlockWriter, block: Block, made_with: dict[str, str]) -> None:
    vocab_size = store.recipe["tokenizer"]["vocab_size"]
    highest = max(int(s.tokens.max()) for s in block.sequences)
    if highest >= vocab_size:
        raise DataError(f"the tokenizer gave id {highest}, its vocabulary ends at {vocab_size - 1}")
    samples = [_sample(s) for s in block.sequences]
    extra = block.extra | ({"made_with": made_with} if made_with else {})
    store.commit(block.number, samples, statistics=block.statistics, **extra)


def _sample(sequence: Sequence) -> dict[str, Any]:
    sample: dict[str, Any] = {"tokens": sequence.tokens, "documents": sequence.documents}
    if sequence.loss_mask is not None:
        sample["loss_mask"] = sequence.loss_mask
    if sequence.padding is not None:
        sample["padding"] = np.uint64(sequence.padding)
    return sample


def check_learned(counted: Mapping[str, int], *, name: str) -> None:
    """DataError where the loss mask leaves nothing to learn; a warning where it leaves little.

    counted: the statistics of the token store `name`.
    """
    learned, tokens = counted.get("learned_tokens"), counted["tokens"]
    if learned == 0:
        raise DataError(
            f"{name}: none of the {tokens} tokens is learned: expected turns of the "
            "assistant in the chats, or completions: check the roles of the turns and the "
            "data.*_field keys, or set data.text_field to learn from all of a text"
        )
    if learned is not None and learned < LITTLE * tokens:
        percent = f"{100 * learned / tokens:.2f} % of the tokens are learned"
        log.warning("%s: only %s (%d of %d)", name, percent, learned, tokens)


def too_short(data: DataConfig, run: CorpusRun) -> str:
    """The message for a corpus that ended before its first sequence."""
    where = data.source or data.name or ", ".join(data.files or [])
    if run.stream.held == 0:
        skipped = f", {run.skipped.count} of them skipped" if run.skipped.count else ""
        return f"{where}: the corpus is empty: {run.read} documents without text were read{skipped}"
    return (
        f"{where}: {run.read} documents with {run.stream.held} tokens are less than one sequence "
        f"of data.seq_len {data.seq_len}: set data.seq_len lower, or read more text"
    )


def _report(store: BlockReader) -> None:
    s = statistics(store)
    documents, tokens = max(1, s["documents"]), max(1, s["tokens"])
    padding = s.get("padding_tokens", 0)
    log.info(
        "%s: %d documents (%d characters) in %d sequences, %d tokens and %d of padding (%.2f %%); "
        "left out %d empty documents, and %d tokens of %d documents at the end",
        store.path,
        s["documents"],
        s["characters"],
        s["sequences"],
        s["tokens"],
        padding,
        100 * padding / (tokens + padding),
        s["empty_documents"],
        s["dropped_tokens"],
        s.get("dropped_documents", 0),
    )
    # A small corpus has its last sequences open, whatever the lengths of its documents.
    if padding > PADDING * (tokens + padding) and s["sequences"] >= MANY:
        log.warning(
            "%s: %.0f %% of the positions are padding, which costs the teacher's and the student's "
            "time: documents are often longer than half a sequence; set data.packing=in_order, or "
            "another data.seq_len, and data.dir to another folder",
            store.path,
            100 * padding / (tokens + padding),
        )
    if "cut_tokens" in s:  # older stores counted cuts
        log.info(
            "%s: %d of %d documents (%.1f %%) are cut; %d tokens (%.1f %%) lie behind a cut, "
            "without the document's beginning",
            store.path,
            s["cut_documents"],
            s["documents"],
            100 * s["cut_documents"] / documents,
            s["cut_tokens"],
            100 * s["cut_tokens"] / tokens,
        )
