"""What a cache or a token store holds, and whether it is whole.

    python tools/inspect_cache.py [CACHE] [--config C] [--verify] [--json] [--plot DIR]

Exit code 0: complete and sound. 1: incomplete or damaged. 2: cannot be read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cache.inspection import inspect_store
from megadistill.cache.report import table
from megadistill.commands import run


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    return show(args.cache or configured(args.config, args.overrides), args)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a cache or a token store holds.")
    parser.add_argument("cache", nargs="?", metavar="CACHE", help="default: the configured one")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change the configuration")
    parser.add_argument("--config", help="whose cache.dir to inspect; default zero3.yaml")
    parser.add_argument("--verify", action="store_true", help="read and check every byte")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="DIR", help="write pictures over the blocks there")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(arguments)
    if args.cache and "=" in args.cache and not os.path.exists(args.cache):
        args.cache, args.overrides = None, [args.cache, *args.overrides]
    return args


def configured(name: str | None, overrides: list[str]) -> str:
    from megadistill.config import load_config

    return load_config(name, overrides).cache.dir


def show(path: str, args: argparse.Namespace) -> int:
    if args.verify:
        from tqdm import tqdm

        # None: no bar where standard error is not a terminal.
        with tqdm(desc="verifying", unit=" blocks", disable=None) as bar:
            facts = inspect_store(
                path, verify=True, workers=max(1, args.workers), progress=lambda _: bar.update()
            )
    else:
        facts = inspect_store(path)
    print(json.dumps(facts, sort_keys=True) if args.json else table(facts))
    if args.plot:
        from megadistill.cache.plots import plot_store

        for file in plot_store(path, args.plot):
            print(file, file=sys.stderr)
    return 0 if facts["complete"] else 1


if __name__ == "__main__":
    sys.exit(run(main))
