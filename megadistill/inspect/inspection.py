"""Facts about a store, for tools/inspect_cache.py. Costs no torch and no streaming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megadistill.blocks import BlockReader, open_store
from megadistill.blocks.derived import RECORD, combined_hash, record_of
from megadistill.blocks.maintenance.verify import Check, read_markers, verify_store
from megadistill.blocks.recipe import differences
from megadistill.cache.reader import Cache
from megadistill.cache.statistics import combine, summary
from megadistill.data.recipe_keys import CORPUS_KEYS
from megadistill.errors import StoreError

_PARAMETERS = (
    "temperature",
    "tau",
    "k",
    "p",
    "draws",
    "options",
    "method_distribution",
    "positions",
    "min_entropy",
    "seed",
)


def block_check(store: BlockReader) -> Check | None:
    """Returns a cache's check of a block: targets decoded, statistics recomputed; else None."""
    return Cache(store).check if store.kind == "cache" else None


def require_sum(whole: BlockReader, taken: dict[int, BlockReader]) -> None:
    """StoreError unless the statistics of a merged store are the sum of those of its blocks.

    taken  block -> the store it came from, where `block_check` has recomputed its statistics
    """
    expected = combine([_numbers(part.marker(b)["statistics"]) for b, part in taken.items()])
    found = combine([_numbers(whole.marker(b)["statistics"]) for b in whole.committed()])
    for field, ours, theirs in differences(expected, found):
        raise StoreError(
            f"{whole.path}: statistics.{field} is {theirs}, the sum of its blocks' is {ours}: "
            "remove it and merge again"
        )


def inspect_store(
    path: str | Path,
    *,
    verify: bool = False,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Everything known of the store in a folder, as plain values for JSON.

    verify  read and check every byte; else the markers and the sizes of the shards only
    The member `findings` lists what is damaged, a line each; `unfinished` says what keeps a store
    with neither damage nor missing blocks from being complete. Raises StoreError where the folder
    holds no store, or the header cannot be believed.
    """
    store = open_store(path)
    check = block_check(store)
    markers, findings = read_markers(store)
    planned = [m for m in markers if store.num_blocks is None or m["block"] < store.num_blocks]
    if verify:
        findings = verify_store(store, workers=workers, progress=progress, check=check)
    else:
        findings += [
            f"{store.layout.shard(m['block'])}: expected {m['shard']['size']} bytes, found others"
            for m in markers
            if not store.shard_is_there(m)
        ]
    complete = not findings and store.complete()
    missing = _missing(store, markers)
    facts = {
        "path": store.name,
        "kind": store.kind,
        "format_version": store.header["format_version"],
        "complete": complete,
        "verified": verify,
        "num_blocks": store.num_blocks if store.num_blocks is not None else len(markers),
        "committed_blocks": len(planned),
        "missing_blocks": missing,
        "num_sequences": sum(m["sequences"] for m in planned),
        "planned_sequences": store.num_sequences,
        "block_size": store.block_size,
        "bytes": sum(m["shard"]["size"] for m in markers),
        "content_hash": combined_hash(np.array([record_of(m) for m in planned], RECORD)),
        "findings": findings,
        "unfinished": None if complete or findings or missing else _why_incomplete(store),
    }
    return facts | _recipe(store) | _targets(store, planned, facts)


def _missing(store: BlockReader, markers: list[dict[str, Any]]) -> list[int]:
    """The planned blocks without a marker that fits the plan."""
    total, size = store.num_sequences or 0, store.block_size
    held = {m["block"]: m["sequences"] for m in markers}
    return [b for b in range(store.num_blocks or 0) if held.get(b) != min(size, total - b * size)]


def _why_incomplete(store: BlockReader) -> str:
    if store.num_sequences is None:
        return f"{store.layout.plan}: not there yet: the run that writes this store has not ended"
    return (
        f"{store.layout.blocks_bin}, {store.layout.index}: not what the markers say: run again "
        "what wrote this store, which mends them without computing anything"
    )


def _recipe(store: BlockReader) -> dict[str, Any]:
    recipe, names = store.recipe, store.names
    columns = store.columns.get("tokens", "").rpartition(":")[2]
    return {
        "method": recipe.get("method"),
        "parameters": {k: recipe[k] for k in _PARAMETERS if k in recipe},
        "teacher": _with_name(recipe.get("teacher"), names.get("teacher.model")),
        "tokenizer": _with_name(recipe.get("tokenizer"), names.get("data.tokenizer")),
        "data": next((names[k] for k in CORPUS_KEYS if k in names), None),
        "vocab_size": recipe.get("vocab_size"),
        "seq_len": recipe.get("seq_len", int(columns) if columns.isdigit() else None),
    }


def _with_name(recorded: Any, name: str | None) -> Any:
    """Returns a recipe's record of a model, with its name where the store has one."""
    if name is None:
        return recorded
    return {"name": name} | (recorded if isinstance(recorded, dict) else {})


def _targets(
    store: BlockReader, markers: list[dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    statistics = combine([_numbers(m["statistics"]) for m in markers])
    made_with: list[Any] = []
    for marker in markers:
        if marker.get("made_with") not in (None, *made_with):
            made_with.append(marker["made_with"])
    if store.kind == "cache":
        return {**_summary(store, statistics), "made_with": made_with}
    positions = facts["num_sequences"] * (_recipe(store)["seq_len"] or 0)
    positions -= statistics.get("padding_tokens", 0)
    return {
        "num_positions": positions,
        "entries_per_position": None,
        "bytes_per_position": facts["bytes"] / positions if positions else None,
        "listed_mass": None,
        "entropy": None,
        "teacher_nll": None,
        "statistics": statistics,
        "made_with": made_with,
    }


def _summary(store: BlockReader, statistics: dict[str, Any]) -> dict[str, Any]:
    try:
        return summary(statistics)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise StoreError(
            f"{store.layout.blocks}: the markers' statistics are not a cache's: {error!r}"
        ) from error


def _numbers(statistics: dict[str, Any]) -> dict[str, Any]:
    """Returns the members of a marker's statistics that can be added up."""
    return {k: v for k, v in statistics.items() if isinstance(v, int | list | dict)}
