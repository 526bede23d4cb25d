"""Merge caches (or token stores) of one recipe into one, and show what it holds.

    megadistill merge --out OUT CACHE [CACHE ...] [--prefer CACHE] [--json]

Every block is verified before it is taken, and taken as it is: linked where OUT is on the same file
system, else copied. A held-out cache beside a part (CACHE.heldout, of eval.files) is taken along to
OUT.heldout.

Exit code 0: complete and sound. 1: blocks are missing. 2: nothing was done.
"""

from __future__ import annotations

import argparse
import os

from megadistill.blocks import open_store
from megadistill.blocks.maintenance.merge import Merged, merge_stores
from megadistill.cli.answer import answer
from megadistill.cli.command_line import new_parser, read_arguments
from megadistill.cli.stores import WATCHED, add_store_options, refuse_url
from megadistill.config.held_out import SUFFIX
from megadistill.data.recipe_keys import keys_of
from megadistill.inspect.cache_tables import table
from megadistill.inspect.inspection import inspect_store, require_sum
from megadistill.storage.disk import is_url


def main(argv: list[str], *, prog: str | None = None) -> int:
    parser = new_parser(__doc__, prog=prog)
    parser.add_argument("caches", nargs="+", metavar="CACHE")
    parser.add_argument("--out", required=True, help="a new folder, or a store to merge into")
    parser.add_argument("--prefer", metavar="CACHE", help="whose blocks win where two differ")
    add_store_options(parser)
    args = read_arguments(parser, argv)
    refuse_url(parser, args.out)
    return merge(args)


def merge(args: argparse.Namespace) -> int:
    parts = [open_store(path) for path in args.caches]
    keys = keys_of(None, kind=parts[0].kind)
    merged = merge_stores(
        args.out, parts, prefer=args.prefer, workers=args.workers, keys=keys, **WATCHED
    )
    require_sum(merged.store, merged.taken)
    held_out = merge_held_out(args)
    # Every block was verified on its way.
    facts = inspect_store(args.out) | {"verified": True, "taken": taken(merged)}
    lines = [f"  {count:,} block(s) from {path}" for path, count in facts["taken"].items()]
    checked = "  Every statistic was recomputed; the whole's are their sum."
    if held_out:
        checked += f"\n  The held-out cache is in {held_out}."
    answer(facts, lambda: "\n".join([table(facts), *lines, checked]), as_json=args.json)
    return 0 if facts["complete"] else 1


def merge_held_out(args: argparse.Namespace) -> str | None:
    """Take the held-out caches beside the parts along, to where training looks for them."""
    beside = [path.rstrip("/") + SUFFIX for path in args.caches if not is_url(path)]
    parts = [open_store(path) for path in beside if os.path.isdir(path)]
    if not parts:
        return None
    out: str = args.out.rstrip("/") + SUFFIX
    merge_stores(out, parts, workers=args.workers, keys=keys_of(None, kind="cache"), **WATCHED)
    return out


def taken(merged: Merged) -> dict[str, int]:
    """Folder -> how many blocks came from it."""
    counts: dict[str, int] = {}
    for store in merged.taken.values():
        counts[store.name] = counts.get(store.name, 0) + 1
    return counts
