"""Split a cache (or a token store) into parts, which merged are the cache again, byte for byte.

    megadistill split --parts N --out OUT CACHE [--json]

Writes OUT.0 to OUT.(N-1): block b goes to part b mod N. Exit code 0: done. 2: nothing was done.
"""

from __future__ import annotations

import argparse

from megadistill.blocks import open_store
from megadistill.blocks.maintenance.split import split_store
from megadistill.cli.answer import answer
from megadistill.cli.command_line import count, new_parser, read_arguments
from megadistill.cli.stores import WATCHED, add_store_options, refuse_url


def main(argv: list[str], *, prog: str | None = None) -> int:
    parser = new_parser(__doc__, prog=prog)
    parser.add_argument("cache", metavar="CACHE")
    parser.add_argument("--parts", metavar="N", type=count, required=True, help="number of parts")
    parser.add_argument("--out", required=True, help="the parts' folders are OUT.0, OUT.1, ...")
    add_store_options(parser)
    args = read_arguments(parser, argv)
    refuse_url(parser, args.out)
    return split(args.cache, args.parts, args)


def split(path: str, number: int, args: argparse.Namespace) -> int:
    store = open_store(path)
    parts = split_store(store, args.out, number, workers=args.workers, **WATCHED)
    facts = {"parts": {str(part.path): len(part.committed()) for part in parts}}
    lines = [f"{path}: {blocks:,} block(s)" for path, blocks in facts["parts"].items()]
    answer(facts, lambda: "\n".join(lines), as_json=args.json)
    return 0
