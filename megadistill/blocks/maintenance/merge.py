"""Merging stores of one recipe: blocks are taken over as they are, never encoded again.

Parts may overlap. A block that two parts hold must be the same bytes in both: a recipe decides its
blocks' bytes, so a difference means that something is not what its recipe says. Only
`made_with` may differ: then the first part's marker is taken, and the difference is reported.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megadistill.blocks.layout import kind_of
from megadistill.blocks.maintenance.pool import each_block
from megadistill.blocks.maintenance.verify import Check, CheckOf, no_check, verify_block
from megadistill.blocks.reader import BlockReader
from megadistill.blocks.recipe import Keys, require_same_recipe
from megadistill.blocks.writer import BlockWriter
from megadistill.errors import StoreError
from megadistill.storage.files import LOCAL, Files
from megadistill.storage.progress import BlockProgress
from megadistill.storage.records import encode_json

log = logging.getLogger(__name__)

_SEPARATE = "they cannot be one store; training takes a list of caches instead"
_SHOWN = 8  # blocks listed in a message


@dataclass(frozen=True)
class Merged:
    """A merged store, and which part each of its blocks was taken from."""

    store: BlockReader
    taken: dict[int, BlockReader]


def merge_stores(
    out: str | Path,
    parts: Sequence[BlockReader],
    *,
    prefer: str | Path | None = None,
    check_of: CheckOf = no_check,
    workers: int = 1,
    show_progress: bool | None = False,
    keys: Keys | None = None,
    files: Files = LOCAL,
) -> Merged:
    """Every block of the parts in one store at `out`, sharing their bytes on disk where it can.

    out            a new folder, or a store of the same recipe, which then counts as a part
    prefer         the part whose blocks win where two parts differ
    check_of       what only the caller can check of a store's blocks, see verify.CheckOf
    workers        processes that verify
    show_progress  see BlockProgress
    keys           what the user calls the recipe's fields, for messages

    Every block is verified before it is taken. Raises RecipeError for parts of different recipes,
    naming the keys; StoreError listing the blocks that differ; CorruptBlockError. Until a block's
    bytes are known to be sound and undisputed, nothing is written.
    """
    if not parts:
        raise StoreError(f"{out}: nothing to merge, expected at least one store")
    for part in parts:
        _require_same_kind(parts[0], part, keys)
    wanted = _preferred(parts, prefer)
    if kind_of(Path(out)) == parts[0].kind:
        existing = BlockReader.open(out)
        _require_same_kind(parts[0], existing, keys)
        if not any(_same_folder(p, existing) for p in parts):
            parts = [existing, *parts]
    total = _common_plan(parts)
    holders = _holders(parts, total, prefer=wanted)
    taken = sound_blocks(holders, check_of=check_of, workers=workers, show_progress=show_progress)
    store = gather(
        out, parts[0], taken, total=total, what="merging", show_progress=show_progress, files=files
    )
    return Merged(store, taken)


def sound_blocks(
    holders: dict[int, list[BlockReader]],
    *,
    check_of: CheckOf,
    workers: int,
    show_progress: bool | None,
) -> dict[int, BlockReader]:
    """block -> the first of its holders whose copy is whole. CorruptBlockError where none is."""
    parts = list({id(p): p for candidates in holders.values() for p in candidates}.values())
    numbers = {id(part): n for n, part in enumerate(parts)}
    items = [(b, [numbers[id(p)] for p in candidates]) for b, candidates in holders.items()]
    taken = {}
    with BlockProgress("verifying", total=len(items), show=show_progress) as bar:
        context = [(part, check_of(part)) for part in parts]
        for block, number in each_block(_first_sound, context, items, workers=workers):
            taken[block] = parts[number]
            bar.add(block)
    return taken


def gather(
    out: str | Path,
    like: BlockReader,
    taken: dict[int, BlockReader],
    *,
    total: int | None,
    what: str,
    show_progress: bool | None,
    files: Files,
) -> BlockWriter:
    """The store at `out`, of the recipe of `like`, with the blocks taken from other stores."""
    merged = BlockWriter.create_like(out, like, files=files)
    with merged.lock(), BlockProgress(what, total=len(taken), show=show_progress) as bar:
        merged.clean()
        if total is not None:
            merged.plan(total)
        for block, holder in taken.items():
            if not _same_folder(holder, merged):
                merged.adopt(block, holder)
            bar.add(block)
        merged.finish()
    return merged


def _require_same_kind(first: BlockReader, other: BlockReader, keys: Keys | None) -> None:
    fields = ("kind", "recipe", "block_size", "columns", "ids_bin")
    require_same_recipe(
        {k: first.header.get(k) for k in fields},
        {k: other.header.get(k) for k in fields},
        file=str(first.layout.header(first.kind)),
        other=f"in {other.layout.header(other.kind)} it is",
        keys=Keys(of=(keys or Keys()).of, way_out=_SEPARATE),
        names=(first.names, other.names),
    )


def _preferred(parts: Sequence[BlockReader], prefer: str | Path | None) -> BlockReader | None:
    if prefer is None:
        return None
    for part in parts:
        if part.path.resolve() == Path(prefer).resolve():
            return part
    raise StoreError(f"{prefer}: is not among the stores to merge, and cannot be preferred")


def _common_plan(parts: Sequence[BlockReader]) -> int | None:
    plans = sorted({p.num_sequences for p in parts if p.num_sequences is not None})
    if len(plans) > 1:
        log.warning("the parts plan %s sequences; the merged store plans %d", plans, plans[-1])
    return plans[-1] if plans else None


def _holders(
    parts: Sequence[BlockReader], total: int | None, *, prefer: BlockReader | None
) -> dict[int, list[BlockReader]]:
    """block -> the parts that hold it, all with equal bytes or the preferred one alone."""
    found: dict[int, dict[bytes, list[BlockReader]]] = {}
    made_with: dict[int, set[str]] = {}
    for part in parts:
        for block in part.present():
            marker = part.marker(block)
            if total is not None and marker["sequences"] != _planned(block, total, part.block_size):
                log.info("%s: block %d is short under the merged plan, left out", part.path, block)
                continue
            made_with.setdefault(block, set()).add(str(marker.pop("made_with", None)))
            version = xxhash.xxh3_128_digest(encode_json(marker))
            found.setdefault(block, {}).setdefault(version, []).append(part)
    holders, disputed = {}, []
    for block in sorted(found):
        versions = list(found[block].values())
        if prefer is not None and len(versions) > 1:
            versions = [v for v in versions if prefer in v] or versions
        # Of equal copies the preferred part's comes first: their made_with may differ.
        holders[block] = sorted(versions[0], key=lambda part: part is not prefer)
        if len(versions) > 1:
            disputed.append((block, versions))
    if disputed:
        raise StoreError(_dispute(disputed))
    _tell_mixed([b for b in holders if len(made_with[b]) > 1])
    return holders


def _planned(block: int, total: int, block_size: int) -> int:
    return max(0, min(block_size, total - block * block_size))


def _dispute(disputed: list[tuple[int, list[list[BlockReader]]]]) -> str:
    shown = [
        f"{block} ({' and '.join(str(v[0].path) for v in versions)}: {_what(block, versions)})"
        for block, versions in disputed[:_SHOWN]
    ]
    more = f" and {len(disputed) - _SHOWN} more" if len(disputed) > _SHOWN else ""
    return (
        f"blocks held twice with different bytes: {', '.join(shown)}{more}: "
        "choose with --prefer CACHE, after `inspect_cache.py CACHE --verify` of each"
    )


def _what(block: int, versions: list[list[BlockReader]]) -> str:
    left, right = (v[0].marker(block) for v in versions[:2])
    keys = sorted(k for k in left.keys() | right.keys() if left.get(k) != right.get(k))
    return "differ in " + ", ".join(keys)


def _tell_mixed(blocks: list[int]) -> None:
    if blocks:
        more = f" and {len(blocks) - _SHOWN} more" if len(blocks) > _SHOWN else ""
        log.warning(
            "held twice with equal bytes but another made_with: block %s%s: the first is taken",
            ", ".join(map(str, blocks[:_SHOWN])),
            more,
        )


def _first_sound(
    parts: list[tuple[BlockReader, Check | None]], item: tuple[int, list[int]]
) -> tuple[int, int]:
    """(block, the first of the numbered parts whose copy of it is whole)."""
    block, numbers = item
    error: StoreError | None = None
    for number in numbers:
        part, check = parts[number]
        try:
            _, findings = verify_block(part, block, check=check)
        except StoreError as found:
            error = error or found
            continue
        # A block may be short under the part's own plan and right under the merged one.
        findings = [f for f in findings if " by the plan, " not in f]
        if not findings:
            return block, number
        error = error or StoreError(findings[0])
    assert error is not None
    raise error


def _same_folder(a: Any, b: Any) -> bool:
    return a.path.resolve() == b.path.resolve()
