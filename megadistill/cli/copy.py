"""Copy a cache (or a token store) to a URL, from one, or between folders.

    megadistill copy SOURCE DEST [--verify] [--workers N]
    python tools/copy_cache.py SOURCE DEST [--verify] [--workers N]

URLs are fsspec's: sftp://host/path, s3://bucket/path, gs://..., hf://datasets/owner/name/path,
file://... Started again after an interruption, it resumes; at a place that holds
another store it changes nothing. --verify reads back every shard that lies at DEST.
Exit code 0: DEST is what SOURCE is. 2: not copied.
"""

from __future__ import annotations

import argparse

from megadistill.blocks.remote.object_store import shown
from megadistill.blocks.remote.upload import copy_store
from megadistill.cli.command_line import count, new_parser, read_arguments
from megadistill.storage.progress import BlockProgress


def main(argv: list[str], *, prog: str | None = None) -> int:
    args = parse(argv, prog)
    with BlockProgress("copying", total=None) as bar:
        copied = copy_store(
            args.source, args.dest, verify=args.verify, workers=args.workers, progress=bar.add
        )
    print(f"{shown(args.dest)}: {copied.sent} blocks sent, {copied.there} were there")
    return 0


def parse(argv: list[str], prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog=prog)
    parser.add_argument("source", metavar="SOURCE", help="a folder or a URL")
    parser.add_argument("dest", metavar="DEST", help="a folder or a URL")
    parser.add_argument("--verify", action="store_true", help="read back every shard at DEST")
    parser.add_argument("--workers", type=count, default=4, help="shards sent at a time")
    return read_arguments(parser, argv)
