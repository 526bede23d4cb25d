"""A cache with fewer entries per token, made from a larger one without the teacher.

    megadistill retruncate CACHE --out OUT (--tau X | --k K | --p P) [--seed S] [--json]
    python tools/retruncate_cache.py CACHE --out OUT (--tau X | --k K | --p P) [--seed S] [--json]

varopt goes to a larger tau and stays unbiased; topk and topp go to a smaller k or p, what they drop
joins the tail. Resumes an interrupted run. Exit code 0: OUT is complete. 1: it
is damaged. 2: nothing was made.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from megadistill.cache.retruncate import retruncate_cache
from megadistill.cli.answer import answer
from megadistill.cli.command_line import new_parser, read_arguments
from megadistill.inspect.cache_tables import table
from megadistill.inspect.inspection import inspect_store
from megadistill.storage.progress import BlockProgress


def main(argv: list[str], *, prog: str | None = None) -> int:
    args = parse(argv, prog)
    retruncate(args)
    facts = inspect_store(args.out)
    answer(facts, lambda: table(facts), as_json=args.json)
    return 0 if facts["complete"] else 1


def parse(argv: list[str], prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog=prog)
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
    return read_arguments(parser, argv)


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
