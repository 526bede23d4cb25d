"""Merge caches (or token stores) of one recipe into one, and show what it holds.

    python tools/merge_and_inspect.py --out OUT CACHE [CACHE ...] [--prefer CACHE] [--json]

Every block is verified before it is taken, and taken as it is: linked where OUT is on the same file
system, else copied. Exit code 0: OUT is complete and sound. 1: blocks are missing. 2: not merged.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.blocks import BlockStore
from megadistill.blocks.merge import merge_stores
from megadistill.cache.inspection import block_check, inspect_store
from megadistill.cache.report import table
from megadistill.commands import run


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    merge(args)
    facts = inspect_store(args.out)
    print(json.dumps(facts, sort_keys=True) if args.json else table(facts))
    return 0 if facts["complete"] else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merge caches of one recipe.")
    parser.add_argument("caches", nargs="+", metavar="CACHE")
    parser.add_argument("--out", required=True, help="a new folder, or a store to merge into")
    parser.add_argument("--prefer", metavar="CACHE", help="whose blocks win where two differ")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def merge(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    parts = [BlockStore.open(path) for path in args.caches]
    # None: no bar where standard error is not a terminal.
    with tqdm(desc="merging", unit=" blocks", disable=None) as bar:
        merge_stores(
            args.out,
            parts,
            prefer=args.prefer,
            check=block_check(parts[0]),
            progress=lambda _: bar.update(),
        )


if __name__ == "__main__":
    sys.exit(run(main))
