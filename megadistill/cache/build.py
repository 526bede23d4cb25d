"""Building a cache: blocks of token sequences in, committed blocks of targets out.

The loop between the teacher and the store. What decides a block's bytes is its recipe alone: a
micro-batch is consecutive sequences of one block, the last one padded to full shape with repeats
that are dropped, whoever computes it.

Under `tensor_parallel` the first rank of each tp group claims the next missing block from a counter
in the process group's store, so that a slow host holds up nobody. Under `zero3` forwards are
collective: ranks go in rounds, rank i takes the i-th missing block, and a rank without one runs
padding. Claims are forgotten, commits are durable. Encoding and writing run beside the teacher, one
block computing and one being written. A disk that runs full, or a writer that fails, stops all
ranks at their next block (`reserve`).

Shape letters: B sequences, T positions, N = B*T.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from megadistill.blocks import BlockReader, BlockWriter, open_store
from megadistill.cache.cache_recipe import made_with
from megadistill.cache.cache_store import (
    blocks_to_do,
    caches_to_build,
    create_store,
    is_done,
    outdated_blocks,
    require_positions,
    require_shards,
)
from megadistill.cache.codec import decode_targets, encode_targets
from megadistill.cache.disk_guard import DiskGuard, FreeBytes
from megadistill.cache.generation_progress import GenerationProgress
from megadistill.cache.reader import Cache, open_cache
from megadistill.cache.writer import CacheWriter
from megadistill.config import Config
from megadistill.config.held_out import in_eval_keys
from megadistill.data.learned import require_learned
from megadistill.data.tokens import build_tokens
from megadistill.errors import MegadistillError, TeacherError
from megadistill.models.packed_sequences import sample_labels
from megadistill.parallel import Mesh, accounted
from megadistill.storage.disk import free_bytes
from megadistill.targets import SparseTargets, concatenate
from megadistill.teacher.engine import Teacher, load_teacher
from megadistill.teacher.select import selection

log = logging.getLogger(__name__)

VALIDATED_SEQUENCES = 8


@dataclass(frozen=True)
class Built:
    """Holds the result of a run of `build_cache`."""

    sequences: int
    blocks: int
    computed_blocks: int
    seconds: float


def build_cache(
    config: Config, mesh: Mesh, *, validate: bool = True, free_bytes: FreeBytes = free_bytes
) -> Built:
    """Tokenise what is missing, run the teacher over the missing blocks, derive, validate.

    Collective over all ranks. On a complete cache it loads no teacher and changes no file.
    `free_bytes` asks the cache's disk after each block; StoreError on all ranks where it is too
    full to go on, and what is committed stays.
    """
    started = time.monotonic()
    wanted = caches_to_build(config)
    teacher: Teacher | None = None
    built: list[Built] = []
    with contextlib.ExitStack() as held:  # rank 0 holds the stores' locks to the end
        held.enter_context(accounted(partial(_account, config)))

        # All text is tokenised first, the short held-out text before the other: a mistake in it is
        # found before anything takes long.
        def prepare() -> list[list[int]]:
            last_first = [_prepare(c, held, is_held_out=c is not config) for c in wanted[::-1]]
            return last_first[::-1]

        to_do = mesh.run_on_rank0(prepare)
        for each, missing in zip(wanted, to_do, strict=True):
            tokens = open_store(each.data.dir)
            store = BlockWriter.open(each.cache.folder)
            each = _with_positions(each, store)
            if missing:
                if teacher is None:
                    teacher = load_teacher(each, mesh, vocab_size=store.recipe["vocab_size"])
                _compute(each, mesh, teacher, tokens, store, missing, free_bytes)
                mesh.run_on_rank0(partial(_finish, store))
                if validate:
                    _validate(each, mesh, teacher, tokens, store)
            if mesh.rank == 0:
                _tell(each, store, computed=len(missing))
            seconds = time.monotonic() - started
            built.append(Built(len(store), store.num_blocks or 0, len(missing), seconds))
    return built[0]


def _finish(store: BlockWriter) -> None:
    store.finish()
    require_positions(store)


def _account(config: Config) -> str:
    """Returns a line about the committed blocks, for a run that is stopped."""
    for path, kind in ((config.cache.folder, "cache"), (config.data.dir, "tokens")):
        with contextlib.suppress(MegadistillError, OSError):
            store = open_store(path)
            blocks = "" if store.num_blocks is None else f" of {store.num_blocks}"
            if kind == "tokens" or store.present():
                return (
                    f"{path}: {len(store.present())}{blocks} blocks are committed; the same "
                    "command resumes there"
                )
    return "no block is committed yet; the same command begins anew"


def _with_positions(config: Config, store: BlockReader) -> Config:
    """The configuration with the positions that the cache was begun with."""
    targets = config.targets.model_copy(update={"positions": store.recipe["positions"]})
    return config.model_copy(update={"targets": targets})


def _prepare(config: Config, held: contextlib.ExitStack, *, is_held_out: bool = False) -> list[int]:
    """On rank 0: the token store, the cache's folder, and the blocks to do."""
    with in_eval_keys(config) if is_held_out else contextlib.nullcontext():
        tokens = build_tokens(config)
        require_learned(tokens, key="data.dir")
        store = create_store(config, tokens)
    outdated = outdated_blocks(store, tokens)
    if is_done(config, store, tokens):
        return []
    held.enter_context(store.lock())
    require_shards(store)
    store.clean()
    if outdated:
        log.info(
            "%s: %d blocks hold other tokens than %s by now, and are done again",
            store.path,
            len(outdated),
            config.data.dir,
        )
        store.plan(None)
        store.retract(outdated)
    store.plan(len(tokens))
    missing = blocks_to_do(config, store)
    if not missing:
        store.finish()
    return missing


def _tell(config: Config, store: BlockReader, *, computed: int) -> None:
    if store.missing():  # the other parts'
        log.info(
            "%s: part %s is complete; when the others are, merge them: "
            "python tools/merge_and_inspect.py --out OUT %s OTHER ...",
            config.cache.folder,
            config.cache.part,
            config.cache.folder,
        )
    elif not computed:
        log.info("%s: complete already, %d sequences", config.cache.folder, len(store))


def _compute(
    config: Config,
    mesh: Mesh,
    teacher: Teacher,
    tokens: BlockReader,
    store: BlockWriter,
    missing: list[int],
    free_bytes: FreeBytes,
) -> None:
    run = mesh.run_on_rank0(lambda: time.time_ns())
    reserve = DiskGuard(
        mesh, store, config.cache, run=run, missing=len(missing), free_bytes=free_bytes
    )
    groups = mesh.world if teacher.lockstep else mesh.dp
    index, parts = config.cache.part_index
    part_blocks = len(range(index, store.num_blocks or 0, parts))
    progress = GenerationProgress(
        mesh, reserve, tokens, store, missing, blocks=part_blocks, groups=groups
    )
    with progress:
        with CacheWriter(
            store,
            made_with=made_with(
                device=mesh.device.type,
                accelerator=_accelerator(mesh),
                cpu_threads=torch.get_num_threads(),
                method=config.targets.method,
            ),
            on_commit=reserve.committed,
            on_error=reserve.ask_to_stop,
        ) as writer:
            for block in _claims(mesh, teacher, missing, run, reserve):
                samples = (
                    []
                    if block is None
                    else mesh.run_once_per_tp_group(partial(tokens.block, block))
                )
                first = 0 if block is None else block * store.block_size
                targets = score(config, teacher, samples, first=first, block_size=store.block_size)
                if block is not None and mesh.tp_rank == 0:
                    writer.submit(block, samples, targets)
                progress.update()
        progress.finish()
    reserve.raise_if_stopped()


def _claims(
    mesh: Mesh, teacher: Teacher, missing: list[int], run: int, reserve: DiskGuard
) -> Iterator[int | None]:
    """The blocks this rank computes; None is a round of padding."""
    if teacher.lockstep:
        for start in range(0, len(missing), mesh.world):
            if mesh.broadcast(reserve.asked_to_stop()):  # heard by all in the same round
                return
            mine = start + mesh.rank
            yield missing[mine] if mine < len(missing) else None
        return
    while True:
        index = len(missing)
        if mesh.tp_rank == 0 and not reserve.asked_to_stop():
            index = mesh.store.add(f"megadistill/claim/{run}", 1) - 1
        if mesh.tp > 1:
            index = mesh.broadcast(index, group=mesh.tp_group)
        if index >= len(missing):
            return
        yield missing[index]


def score(
    config: Config, teacher: Teacher, samples: list[dict[str, Any]], *, first: int, block_size: int
) -> list[SparseTargets]:
    """The targets of consecutive sequences, the first of which is number `first`.

    A lockstep teacher is called as often as a full block needs, whatever there is to score.
    """
    size, seq_len = config.teacher.micro_batch, config.data.seq_len
    padding = {"tokens": np.zeros(seq_len, np.uint32), "documents": np.zeros(1, np.uint32)}
    stop = block_size if teacher.lockstep else len(samples)
    scored: list[SparseTargets] = []
    for start in range(0, stop, size):
        real = samples[start : start + size]
        batch = real + [real[-1] if real else padding] * (size - len(real))
        hidden_NH = teacher.hidden(
            np.stack([s["tokens"] for s in batch]), [s["documents"] for s in batch]
        )
        if real:
            scored += _targets(config, teacher, hidden_NH, real, first + start)
    return scored


def _targets(
    config: Config,
    teacher: Teacher,
    hidden_NH: torch.Tensor,
    samples: list[dict[str, Any]],
    first: int,
) -> list[SparseTargets]:
    seq_len = config.data.seq_len
    # Not set: a loss mask decides where there is one.
    masked = config.targets.positions in (None, "loss_mask")
    labels_BT = np.stack([sample_labels(s, masked=masked) for s in samples])
    numbers, positions = np.divmod(np.arange(len(samples) * seq_len), seq_len)
    keys_N2 = np.stack([first + numbers, positions], 1)
    targets = teacher.head.targets(
        hidden_NH[: len(keys_N2)],
        torch.as_tensor(labels_BT.reshape(-1), device=teacher.device),
        torch.as_tensor(keys_N2, device=teacher.device),
        temperature=config.targets.temperature,
        **selection(config.targets),
    ).numpy()
    return [targets.rows(i * seq_len, (i + 1) * seq_len) for i in range(len(samples))]


def _validate(
    config: Config, mesh: Mesh, teacher: Teacher, tokens: BlockReader, store: BlockReader
) -> None:
    """Score a few sequences again and compare with what the cache says. Collective.

    On the machine that made the cache the ids are equal; another accelerator or a library's atomics
    may move a probability across a threshold, so a hundredth of the positions may differ.
    """
    cache = open_cache(config.cache.folder)
    size = config.teacher.micro_batch
    generator = np.random.default_rng(config.targets.seed)
    blocks = store.committed()  # a part has gaps
    starts = []
    for sequence in generator.permutation(len(store))[:VALIDATED_SEQUENCES]:
        turn, inside = divmod(int(sequence), store.block_size)
        starts.append(blocks[turn] * store.block_size + inside // size * size)
    starts = sorted(set(starts))
    equal = total = 0
    for turn in range(0, len(starts), mesh.dp):
        mine = turn + mesh.dp_rank
        start = starts[mine] if mine < len(starts) else starts[0]
        block_end = min((start // store.block_size + 1) * store.block_size, len(tokens))
        stop = min(start + size, block_end)
        again = score(
            config, teacher, [tokens[i] for i in range(start, stop)], first=start, block_size=size
        )
        if mine < len(starts) and mesh.tp_rank == 0:
            found = concatenate([cache[i]["targets"].numpy() for i in range(start, stop)])
            fresh = concatenate([_coded(t, cache) for t in again])
            equal += int(_equal_rows(found, fresh))
            total += int((fresh.counts > 0).sum())
    sums = mesh.sum(torch.tensor([equal, total], dtype=torch.float64))
    equal, total = int(sums[0]), int(sums[1])
    if equal < 0.99 * total:
        raise TeacherError(
            f"{config.cache.folder}: scored {total} positions again and found other token ids at "
            f"{total - equal}, expected at most {total // 100}: the teacher does not repeat itself "
            "here, or the cache was made elsewhere; --no_validate skips this"
        )
    if mesh.rank == 0:
        log.info("validated: %d of %d positions scored again have the same ids", equal, total)


def _coded(targets: SparseTargets, cache: Cache) -> SparseTargets:
    """As the cache would give them back: what rounds to nothing is not there any more."""
    shape: dict[str, Any] = {"vocab_size": cache.vocab_size, "ranking": cache.ranking}
    return decode_targets(encode_targets(targets, **shape), **shape)


def _equal_rows(a: SparseTargets, b: SparseTargets) -> int:
    """Positions with targets in b that have the same ids in a. A codec keeps no order."""
    same_N = a.counts == b.counts
    (rows, ours), (_, theirs) = _sorted_ids(a, same_N), _sorted_ids(b, same_N)
    different = np.unique(rows[ours != theirs])
    return int((same_N & (b.counts > 0)).sum()) - len(different)


def _sorted_ids(t: SparseTargets, keep_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, id) of the entries of the rows to keep, ids rising within a row."""
    rows = np.repeat(np.arange(len(t)), t.counts)
    kept = keep_N[rows]
    rows, ids = rows[kept], t.ids[kept]
    return rows, ids[np.lexsort((ids, rows))]


def _accelerator(mesh: Mesh) -> str:
    return torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
