"""Generate a cache: run the teacher over a corpus, keep what it says about every position.

    deepspeed [--hostfile hosts | --num_gpus N] launch/generate.py [--config zero3.yaml] [a.b=c ...]
    deepspeed [...] --module megadistill generate [--config zero3.yaml] [a.b=c ...]

Continues where an earlier run stopped, at any number of ranks; on a complete cache it does nothing.
"""

from __future__ import annotations

import argparse

from megadistill.cli.command_line import parse
from megadistill.config import load_config


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no_validate", action="store_true", help="do not score a few sequences again at the end"
    )


def main(argv: list[str], *, prog: str | None = None) -> int:
    arguments = parse(argv, __doc__, prog=prog, extra=options)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from megadistill.preflight import dry_run_generate

        dry_run_generate(config)
        return 0

    from megadistill import parallel
    from megadistill.cache.build import build_cache
    from megadistill.preflight import check_generate
    from megadistill.preflight.plan import log_plan

    _, world, _ = parallel.rank_from_environment()
    plan = check_generate(config, world=world)
    with parallel.joined(tp=config.teacher.tp, **config.parallel.model_dump()) as mesh:
        log_plan(plan)
        build_cache(config, mesh, validate=not arguments.no_validate)
    return 0
