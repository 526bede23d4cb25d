"""Repairing a store: damaged blocks are removed, so that generating again makes them.

A store says of every block what it must be, and cannot say what its bytes were: a damaged block is
dropped, its marker first and durably, its shard after it, as a block that is done again always is.
A crash in between leaves a shard without a marker, which counts for nothing. The header is the one
file that nothing else confirms.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from megadistill.blocks.install import retract_block
from megadistill.blocks.layout import KINDS, Layout, kind_of
from megadistill.blocks.maintenance.pool import each_block
from megadistill.blocks.maintenance.verify import Check, CheckOf, no_check, verify_block
from megadistill.blocks.reader import BlockReader
from megadistill.blocks.writer import BlockWriter
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.storage.files import LOCAL, Files
from megadistill.storage.lock import StoreLock
from megadistill.storage.progress import BlockProgress


@dataclass(frozen=True)
class Repaired:
    """Holds what a repair took out, or would take out.

    dropped  block -> what was wrong with it
    strays   shards without a marker
    plan     whether the plan was damaged; the next run plans again
    """

    dropped: dict[int, str]
    strays: list[Path]
    plan: bool

    def __bool__(self) -> bool:
        return bool(self.dropped or self.strays or self.plan)


def repair_store(
    path: str | Path,
    *,
    check_of: CheckOf = no_check,
    workers: int = 1,
    dry_run: bool = False,
    show_progress: bool | None = False,
    files: Files = LOCAL,
) -> Repaired:
    """Verifies every block, drops damaged ones and leftovers of dead runs, rewrites derived files.

    dry_run  only report, without a lock
    A sound store stays as it is, to the byte. StoreError where the header, or the id ranking that
    it announces, is damaged: then nothing can be believed. LockedError while a run writes.
    """
    layout = Layout(Path(path))
    plan_is_damaged = _plan_is_damaged(layout)
    if dry_run and plan_is_damaged:
        return Repaired({}, [], plan=True)  # without its plan the store cannot be opened
    with contextlib.nullcontext() if dry_run else _lock(layout, files):
        if plan_is_damaged:
            files.unlink(layout.plan)
            files.fsync_dir(layout.path)
        store = BlockWriter.open(path, files=files)
        dropped = _damaged(store, check_of, workers=workers, show_progress=show_progress)
        strays = store.strays()
        if not dry_run:
            for block in dropped:
                retract_block(files, layout, block)
            # Opened again: what it remembers of the dropped blocks is no longer so.
            store = BlockWriter.open(path, files=files)
            store.clean()
            store.finish()
    return Repaired(dropped, strays, plan_is_damaged)


def _lock(layout: Layout, files: Files) -> StoreLock:
    files.mkdir(layout.run)
    return StoreLock(layout.run / "lock", what=str(layout.path), patience_s=60.0)


def _plan_is_damaged(layout: Layout) -> bool:
    """Whether plan.json is all that keeps the store from being opened. StoreError for more."""
    try:
        BlockReader.open(layout.path).ids_bin()
    except CorruptBlockError as error:
        if error.file == str(layout.plan):
            return True
        raise _hopeless(layout.path, error) from error
    return False


def _hopeless(path: Path, error: CorruptBlockError) -> StoreError:
    name = KINDS[kind_of(path) or "cache"]
    return StoreError(
        f"{path}: cannot be repaired, {Path(error.file).name} is damaged (expected "
        f"{error.expected}, found {error.found}): copy {name} and ids.bin from another part or "
        "copy of this store, or generate into another folder"
    )


def _damaged(
    store: BlockReader, check_of: CheckOf, *, workers: int, show_progress: bool | None
) -> dict[int, str]:
    present = store.present()
    context = (store, check_of(store))
    dropped = {}
    with BlockProgress("verifying", total=len(present), show=show_progress) as bar:
        results = each_block(_findings, context, present, workers=workers)
        for block, findings in zip(present, results, strict=True):
            if findings:
                dropped[block] = findings[0]
            bar.add(block)
    return dropped


def _findings(context: tuple[BlockReader, Check | None], block: int) -> list[str]:
    store, check = context
    try:
        return verify_block(store, block, check=check)[1]
    except CorruptBlockError as error:
        # Only this: a file that cannot be opened just now is not damaged, and must not be dropped.
        return [f"{error.file}: expected {error.expected}, found {error.found}"]
