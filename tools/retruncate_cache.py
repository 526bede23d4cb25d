"""A cache with fewer entries per token, made from a larger one without the teacher.

    python tools/retruncate_cache.py CACHE --out OUT (--tau X | --k K | --p P) [--seed S] [--json]

varopt goes to a larger tau and stays unbiased; topk and topp go to a smaller k or p, what they drop
joins the tail. Resumes an interrupted run. Exit code 0: OUT is complete. 1: it
is damaged. 2: nothing was made.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cache.retruncate import retruncate_cache
from megadistill.cli.command_line import run
from megadistill.inspect.cache_tables import table
from megadistill.inspect.inspection import inspect_store
from megadistill.storage.progress import BlockProgress


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    retruncate(args)
    facts = inspect_store(args.out)
    print(json.dumps(facts, sort_keys=True) if args.json else table(facts))
    return 0 if facts["complete"] else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a cache smaller without the teacher.")
    parser.add_argument("cache", metavar="CACHE")
    parser.add_argument("--out", required=True, help="a new folder, or an interrupted run's")
    parser.add_argument("--tau", type=float, help="varopt: larger than the cache's")
    parser.add_argument("--k", type=int, help="topk, topp: entries, fewer than the cache's")
    parser.add_argument("--p", type=float, help="topp: mass, less than the cache's")
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        type=_option,
        action="append",
        default=[],
        help="a parameter of a method that another distribution registers",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new draws; default 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def retruncate(args: argparse.Namespace) -> None:
    with BlockProgress("retruncating", total=None) as bar:
        retruncate_cache(
            args.cache,
            args.out,
            tau=args.tau,
            k=args.k,
            p=args.p,
            options=dict(args.option),
            seed=args.seed,
            progress=bar.add,
        )


if __name__ == "__main__":
    sys.exit(run(main))
