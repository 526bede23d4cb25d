"""Differences of two stores, most important first, for `tools/inspect_cache.py --diff`.

Blocks are compared by what their markers say, so that two caches of any size are compared in the
time of reading the markers; only the first block that differs is read, down to the first position.
What blocks were made with, and files that follow from the markers, may differ between caches of
equal content: that is reported, and does not count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megadistill.blocks import BlockReader, open_store
from megadistill.blocks.recipe import NAMES, differences
from megadistill.cache.reader import Cache
from megadistill.errors import StoreError
from megadistill.inspect.sequence import target_row
from megadistill.storage.disk import is_url

_DERIVED = ("blocks.bin", "index.json")
Facts = dict[str, Any]


def diff_stores(left_path: str | Path, right_path: str | Path) -> Facts:
    """Returns how two stores differ, as plain values for JSON; the member `equal` is the verdict.

    recipe            [{field, left, right}]: the recipe, and what else the header says
    plan              {left, right}: planned sequences; None where equal
    only_left, only_right, different_blocks    block numbers; None where blocks have other sizes
    first             {block, sequence, position, left, right}: where contents part; or None
    told              [{field, left, right, blocks}]: other members of markers of equal content
    derived           names of derived files that differ
    Derived files of a store at a URL are not compared: its local copy holds what is read.
    Raises StoreError for stores of two kinds and what cannot be read, CorruptBlockError.
    """
    left, right = open_store(left_path), open_store(right_path)
    if left.kind != right.kind:
        raise StoreError(
            f"{left_path}: is a store of kind {left.kind}, {right_path} of kind {right.kind}: "
            "expected two of one kind to compare"
        )
    recipe = [
        {"field": field, "left": ours, "right": theirs}
        for field, ours, theirs in differences(_compared(left), _compared(right))
    ]
    plans = (left.num_sequences, right.num_sequences)
    facts: Facts = {
        "left": str(left_path),
        "right": str(right_path),
        "kind": left.kind,
        "recipe": recipe,
        "plan": None if plans[0] == plans[1] else {"left": plans[0], "right": plans[1]},
        **_blocks(left, right),
        "derived": _derived(left, right),
    }
    counted = ("recipe", "plan", "only_left", "only_right", "different_blocks")
    return {"equal": not any(facts[name] for name in counted), **facts}


def _compared(store: BlockReader) -> Facts:
    """Returns the header without names, which say nothing about the content."""
    return {key: value for key, value in store.header.items() if key != NAMES}


def _blocks(left: BlockReader, right: BlockReader) -> Facts:
    if left.block_size != right.block_size:
        names = ("blocks_in_both", "only_left", "only_right", "different_blocks", "first")
        return dict.fromkeys(names) | {"told": []}
    ours, theirs = set(left.present()), set(right.present())
    different: list[int] = []
    notes: dict[str, Facts] = {}
    for block in sorted(ours & theirs):
        a, b = left.marker(block), right.marker(block)
        if any(a[key] != b[key] for key in ("sequences", "content_hash")):
            different.append(block)
            continue
        for field, x, y in differences(a, b):
            entry = notes.setdefault(field, {"field": field, "left": x, "right": y, "blocks": []})
            entry["blocks"].append(block)
    return {
        "blocks_in_both": len(ours & theirs),
        "only_left": sorted(ours - theirs),
        "only_right": sorted(theirs - ours),
        "different_blocks": different,
        "first": _first(left, right, different[0]) if different else None,
        "told": list(notes.values()),
    }


def _first(left: BlockReader, right: BlockReader, block: int) -> Facts:
    """Returns where two copies of a block differ first: sequence, position, and both sides."""
    ours, theirs = _samples(left, block), _samples(right, block)
    place: Facts = {"block": block, "sequence": None, "position": None, "left": None, "right": None}
    for row, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        a_positions, b_positions = _positions(a), _positions(b)
        for position, (x, y) in enumerate(zip(a_positions, b_positions, strict=False)):
            if x != y:
                place |= {"position": position, "left": x, "right": y}
                break
        if place["position"] is not None or len(a_positions) != len(b_positions):
            return place | {"sequence": block * left.block_size + row}
    if len(ours) != len(theirs):
        place["sequence"] = block * left.block_size + min(len(ours), len(theirs))
    return place


def _samples(store: BlockReader, block: int) -> list[dict[str, Any]]:
    return Cache(store).block(block) if store.kind == "cache" else store.block(block)


def _positions(sample: dict[str, Any]) -> list[Facts]:
    """Returns the facts of each position of a sample."""
    starts = np.zeros(len(sample["tokens"]), bool)
    starts[sample["documents"]] = True
    facts: list[Facts] = [
        {"token": int(token), "document_begins": bool(begins)}
        for token, begins in zip(sample["tokens"], starts, strict=True)
    ]
    end = len(facts) - int(sample.get("padding", 0))
    for position, fact in enumerate(facts):
        if "padding" in sample:
            fact["padding"] = position >= end
        if "loss_mask" in sample:
            fact["loss_mask"] = int(sample["loss_mask"][position])
        if "targets" in sample:
            fact |= target_row(sample["targets"], position)
    return facts


def _derived(left: BlockReader, right: BlockReader) -> list[str]:
    if is_url(left.name) or is_url(right.name):
        return []
    return [n for n in _DERIVED if _bytes(left.path / n) != _bytes(right.path / n)]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
