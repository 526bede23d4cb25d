"""Bytes, time and cost of a run, found by running a few blocks of it.

    megadistill plan [--config zero3.yaml] [a.b=c ...] [--price 2.5] [--json]
    python tools/plan.py [--config zero3.yaml] [a.b=c ...] [--price 2.5] [--json]
    deepspeed [--hostfile hosts | --num_gpus N] tools/plan.py [--config zero3.yaml] [a.b=c ...]

Tokenises the beginning of the corpus, loads the teacher and scores a few blocks on every copy of
it, in a temporary folder (TMPDIR): the configured folders are not touched. Started like
launch/generate.py, on the ranks that will run it, so that the pace is theirs. Then the same run at
sizes from 1 million to 100 billion tokens: bytes of token store and cache, hours, cost, and whether
the disk holds it beside cache.min_free.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING

from megadistill.cli.command_line import amount, count, parse
from megadistill.config import Config, load_config

if TYPE_CHECKING:
    from megadistill.preflight.plan.measure import Measured
    from megadistill.preflight.plan.sizes import Rates


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--blocks",
        type=count,
        default=2,
        metavar="N",
        help="blocks to score on each copy of the teacher (default: 2)",
    )
    parser.add_argument("--price", type=amount, metavar="X", help="of a rank, an hour")
    parser.add_argument("--currency", default="USD", help="of the price (default: USD)")
    parser.add_argument(
        "--no_run",
        "--no-run",
        action="store_true",
        help="run nothing: bytes by the assumptions, no hours",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(argv: list[str], *, prog: str | None = None) -> int:
    args = parse(argv, __doc__, prog=prog, extra=options)
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from megadistill.preflight import dry_run_plan

        dry_run_plan(config)
        return 0

    from megadistill.preflight.dry_run import require_cached

    require_cached(config)
    from megadistill.preflight.plan import make_plan
    from megadistill.preflight.plan.plan_report import Report

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    plan = make_plan(config, world=ranks, training=False)
    measured = None if args.no_run else _measure(config, blocks=args.blocks, ranks=ranks)
    if rank != 0:
        return 0
    report = Report(
        config=config,
        plan=plan,
        ranks=ranks,
        measured=measured,
        rates=_assumed(config) if measured is None else measured.rates,
        price=args.price,
        currency=args.currency,
    )
    text = json.dumps(report.as_json(), indent=2) + "\n" if args.json else report.as_text()
    sys.stdout.write(text)
    return 0


def _assumed(config: Config) -> Rates:
    from megadistill.errors import MegadistillError
    from megadistill.models.model_files import find_model
    from megadistill.preflight.plan.sizes import assumed_rates

    teacher, vocab_size = config.teacher, None
    with contextlib.suppress(MegadistillError):  # not on this machine
        vocab_size = find_model(
            teacher.model, key="teacher.model", revision=teacher.revision, fetch=False
        ).vocab_size
    return assumed_rates(config, vocab_size=vocab_size)


def _measure(config: Config, *, blocks: int, ranks: int) -> Measured:
    # Libraries speak on standard output, which is the answer's.
    with contextlib.redirect_stdout(sys.stderr):
        from megadistill import parallel
        from megadistill.preflight import check_generate
        from megadistill.preflight.plan.measure import measure

        check_generate(config, world=ranks, writing=False)
        with parallel.joined(tp=config.teacher.tp, **config.parallel.model_dump()) as mesh:
            return measure(config, mesh, blocks=blocks)
