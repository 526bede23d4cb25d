"""Merge caches (or token stores) of one recipe into one, and show what it holds; repair; split.

    python tools/merge_and_inspect.py --out OUT CACHE [CACHE ...] [--prefer CACHE] [--json]
    python tools/merge_and_inspect.py --repair CACHE [--dry_run] [--json]
    python tools/merge_and_inspect.py --split N --out OUT CACHE [--json]

Every block is verified before it is taken, and taken as it is: linked where OUT is on the same file
system, else copied. --repair drops damaged blocks, so that generating again makes them anew.
A held-out cache beside a part (CACHE.heldout, of eval.files) is taken along to OUT.heldout.
--split gives OUT.0 to OUT.(N-1), which merged are CACHE again, byte for byte.

Exit code 0: complete and sound (--split: done). 1: blocks are missing. 2: nothing was done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.blocks import open_store
from megadistill.blocks.maintenance.merge import Merged, merge_stores
from megadistill.blocks.maintenance.repair import Repaired, repair_store
from megadistill.blocks.maintenance.split import split_store
from megadistill.cli.command_line import count, run
from megadistill.config.held_out import SUFFIX
from megadistill.data.recipe_keys import keys_of
from megadistill.inspect.cache_tables import table
from megadistill.inspect.inspection import block_check, inspect_store, require_sum
from megadistill.storage.disk import is_url

# None: a bar where standard error is a terminal.
WATCHED: dict[str, Any] = {"check_of": block_check, "show_progress": None}
MAKERS = {"cache": "launch/generate.py", "tokens": "tools/make_tokens.py"}
MOST_LINES = 20


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.repair:
        return repair(args)
    if args.split is not None:
        return split(args)
    return merge(args)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("caches", nargs="+", metavar="CACHE")
    parser.add_argument("--out", help="a new folder, or a store to merge into")
    parser.add_argument("--prefer", metavar="CACHE", help="whose blocks win where two differ")
    parser.add_argument("--repair", action="store_true", help="drop what is damaged in CACHE")
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="with --repair: say what it would drop, and drop nothing",
    )
    parser.add_argument("--split", metavar="N", type=int, help="into N parts: block b to b mod N")
    parser.add_argument(
        "--workers",
        type=count,
        default=min(16, os.cpu_count() or 1),
        help="processes that verify; default %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(arguments)
    if args.repair and (args.out or args.prefer or args.split is not None):
        parser.error("--repair works on CACHE itself: leave --out, --prefer and --split out")
    if not args.repair and not args.out:
        parser.error("--out is missing: the folder to write")
    if args.dry_run and not args.repair:
        parser.error("--dry_run goes with --repair")
    if (args.repair or args.split is not None) and len(args.caches) != 1:
        parser.error(f"{len(args.caches)} caches are given, expected one to repair or split")
    written = args.caches[0] if args.repair else args.out
    if is_url(written):
        parser.error(f"{written} is a URL, expected a folder: tools/copy_cache.py copies to a URL")
    return args


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
    answer(args, facts, [table(facts), *lines, checked])
    return 0 if facts["complete"] else 1


def merge_held_out(args: argparse.Namespace) -> str | None:
    """Take the held-out caches beside the parts along, to where training looks for them."""
    beside = [path.rstrip("/") + SUFFIX for path in args.caches if not is_url(path)]
    parts = [open_store(path) for path in beside if os.path.isdir(path)]
    if not parts:
        return None
    out = args.out.rstrip("/") + SUFFIX
    merge_stores(out, parts, workers=args.workers, keys=keys_of(None, kind="cache"), **WATCHED)
    return out


def taken(merged: Merged) -> dict[str, int]:
    """Folder -> how many blocks came from it."""
    counts: dict[str, int] = {}
    for store in merged.taken.values():
        counts[store.name] = counts.get(store.name, 0) + 1
    return counts


def repair(args: argparse.Namespace) -> int:
    path = args.caches[0]
    repaired = repair_store(path, dry_run=args.dry_run, workers=args.workers, **WATCHED)
    found = {
        "dropped": {str(block): why for block, why in repaired.dropped.items()},
        "strays": [str(p) for p in repaired.strays],
        "plan_dropped": repaired.plan,
        "dry_run": args.dry_run,
    }
    if args.dry_run:
        answer(args, found, said(repaired, "would be dropped"))
        return 1 if repaired else 0
    facts = inspect_store(path)
    lines = [*said(repaired, "dropped"), table(facts)]
    if not facts["complete"]:
        maker, key = MAKERS[facts["kind"]], "cache" if facts["kind"] == "cache" else "data"
        lines.append(
            f"  To make what is missing, run {maker} again with the configuration that wrote it "
            f"({key}.dir={path})."
        )
    answer(args, facts | found, lines)
    return 0 if facts["complete"] else 1


def said(repaired: Repaired, done: str) -> list[str]:
    lines = [f"block {block} {done}: {why}" for block, why in repaired.dropped.items()]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more block(s) {done}"]
    lines += [f"{path} {done}: a shard without a marker" for path in repaired.strays[:MOST_LINES]]
    if repaired.plan:
        lines.append(f"plan.json {done}: it is damaged, and the next run plans again")
    return lines or ["nothing is damaged"]


def split(args: argparse.Namespace) -> int:
    store = open_store(args.caches[0])
    parts = split_store(store, args.out, args.split, workers=args.workers, **WATCHED)
    facts = {"parts": {str(part.path): len(part.committed()) for part in parts}}
    lines = [f"{path}: {count:,} block(s)" for path, count in facts["parts"].items()]
    answer(args, facts, lines)
    return 0


def answer(args: argparse.Namespace, facts: dict[str, Any], lines: list[str]) -> None:
    print(json.dumps(facts, sort_keys=True) if args.json else "\n".join(lines))


if __name__ == "__main__":
    sys.exit(run(main))
