"""Drop the damaged blocks of a cache (or a token store), so that generating makes them anew.

    megadistill repair CACHE [--dry_run] [--json]

Exit code 0: complete and sound; with --dry_run: nothing is damaged. 1: blocks are missing; would be
dropped. 2: nothing was done.
"""

from __future__ import annotations

import argparse

from megadistill.blocks.maintenance.repair import Repaired, repair_store
from megadistill.cli.answer import answer
from megadistill.cli.command_line import new_parser, read_arguments
from megadistill.cli.stores import WATCHED, add_store_options, refuse_url
from megadistill.inspect.cache_tables import table
from megadistill.inspect.inspection import inspect_store

MAKERS = {"cache": "launch/generate.py", "tokens": "tools/make_tokens.py"}
MOST_LINES = 20


def main(argv: list[str], *, prog: str | None = None) -> int:
    parser = new_parser(__doc__, prog=prog)
    parser.add_argument("cache", metavar="CACHE")
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="say what it would drop, and drop nothing",
    )
    add_store_options(parser)
    args = read_arguments(parser, argv)
    refuse_url(parser, args.cache)
    return repair(args.cache, args)


def repair(path: str, args: argparse.Namespace) -> int:
    repaired = repair_store(path, dry_run=args.dry_run, workers=args.workers, **WATCHED)
    found = {
        "dropped": {str(block): why for block, why in repaired.dropped.items()},
        "strays": [str(p) for p in repaired.strays],
        "plan_dropped": repaired.plan,
        "dry_run": args.dry_run,
    }
    if args.dry_run:
        answer(found, lambda: "\n".join(said(repaired, "would be dropped")), as_json=args.json)
        return 1 if repaired else 0
    facts = inspect_store(path)
    lines = [*said(repaired, "dropped"), table(facts)]
    if not facts["complete"]:
        maker, key = MAKERS[facts["kind"]], "cache" if facts["kind"] == "cache" else "data"
        lines.append(
            f"  To make what is missing, run {maker} again with the configuration that wrote it "
            f"({key}.dir={path})."
        )
    answer(facts | found, lambda: "\n".join(lines), as_json=args.json)
    return 0 if facts["complete"] else 1


def said(repaired: Repaired, done: str) -> list[str]:
    lines = [f"block {block} {done}: {why}" for block, why in repaired.dropped.items()]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more block(s) {done}"]
    lines += [f"{path} {done}: a shard without a marker" for path in repaired.strays[:MOST_LINES]]
    if repaired.plan:
        lines.append(f"plan.json {done}: it is damaged, and the next run plans again")
    return lines or ["nothing is damaged"]
