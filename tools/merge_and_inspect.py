"""Merge caches (or token stores) of one recipe into one, and show what it holds; repair; split.

    python tools/merge_and_inspect.py --out OUT CACHE [CACHE ...] [--prefer CACHE] [--json]
    python tools/merge_and_inspect.py --repair CACHE [--dry_run] [--json]
    python tools/merge_and_inspect.py --split N --out OUT CACHE [--json]

Every block is verified before it is taken, and taken as it is: linked where OUT is on the same file
system, else copied. --repair drops damaged blocks, so that generating again makes them anew.
A held-out cache beside a part (CACHE.heldout, of eval.files) is taken along to OUT.heldout.
--split gives OUT.0 to OUT.(N-1), which merged are CACHE again, byte for byte.

The same as `megadistill merge`, `megadistill repair` and `megadistill split`.

Exit code 0: complete and sound (--split: done). 1: blocks are missing. 2: nothing was done.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cli.command_line import new_parser, read_arguments, run
from megadistill.cli.merge import merge
from megadistill.cli.repair import repair
from megadistill.cli.split import split
from megadistill.cli.stores import add_store_options, refuse_url


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.repair:
        return repair(args.caches[0], args)
    if args.split is not None:
        return split(args.caches[0], args.split, args)
    return merge(args)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
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
    add_store_options(parser)
    args = read_arguments(parser, arguments)
    if args.repair and (args.out or args.prefer or args.split is not None):
        parser.error("--repair works on CACHE itself: leave --out, --prefer and --split out")
    if not args.repair and not args.out:
        parser.error("--out is missing: the folder to write")
    if args.dry_run and not args.repair:
        parser.error("--dry_run goes with --repair")
    if (args.repair or args.split is not None) and len(args.caches) != 1:
        parser.error(f"{len(args.caches)} caches are given, expected one to repair or split")
    refuse_url(parser, args.caches[0] if args.repair else args.out)
    return args


if __name__ == "__main__":
    sys.exit(run(main))
