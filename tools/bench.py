"""Measure: ratios within one run.

    python tools/bench.py storage [--vocab_size V ...] [--teacher DIR] [--json]
    python tools/bench.py codec   [--vocab_size V] [--json]

storage  bytes a position of varopt and top-64, beside their streams' entropy and other formats
codec    positions a second and core for encoding and decoding, per method

The teacher is the demo's by default (`make demo` makes it); without it only synthetic ones are
measured, and that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.commands import run

VOCABULARIES = [128_256, 151_936, 262_144]


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    import torch

    torch.set_num_threads(1 if args.what == "codec" else os.cpu_count() or 1)
    rows = storage(args) if args.what == "storage" else codec(args)
    for row in rows:
        print(json.dumps(row, sort_keys=True) if args.json else line(row))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["storage", "codec"])
    parser.add_argument("--vocab_size", type=int, nargs="*", default=VOCABULARIES)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--seq_len", type=int, default=2048, help="positions of a sequence")
    parser.add_argument("--teacher", default="runs/demo/teacher", help="a model's folder")
    parser.add_argument("--tokens", default="runs/demo/tokens", help="its token store")
    parser.add_argument("--entropy", type=float, default=1.9, help="nats to sharpen it to")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    return parser.parse_args(arguments)


def storage(args: argparse.Namespace) -> list[dict[str, Any]]:
    from megadistill.bench.distributions import Synthetic, trained
    from megadistill.bench.storage import storage as measure

    rows: list[dict[str, Any]] = []
    if Path(args.teacher).is_dir():
        teacher = trained(args.teacher, args.tokens, positions=args.positions, entropy=args.entropy)
        rows += measure(teacher, seq_len=args.seq_len)
    else:
        print(f"{args.teacher}: not there, left out: `make demo` makes it", file=sys.stderr)
    for vocab_size in args.vocab_size:
        rows += measure(Synthetic(vocab_size, args.positions), seq_len=args.seq_len)
    return rows


def codec(args: argparse.Namespace) -> list[dict[str, Any]]:
    from megadistill.bench.distributions import Synthetic
    from megadistill.bench.speed import speed

    return speed(Synthetic(args.vocab_size[0], args.seq_len))


def line(row: dict[str, Any]) -> str:
    """A row for people: what it is about first, then figures."""
    words = [str(row[k]) for k in ("data", "method") if k in row]
    figures = [
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v:,}"
        for k, v in row.items()
        if not isinstance(v, str)
    ]
    return f"{', '.join(words)}:\n    {'; '.join(figures)}"


if __name__ == "__main__":
    sys.exit(run(main))
