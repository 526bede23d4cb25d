"""Train a student from a cache, or with an online teacher (teacher.mode=online).

    deepspeed [--hostfile hosts | --num_gpus N] launch/train.py [--config zero3.yaml] [a.b=c ...]
    deepspeed [...] --module megadistill train [--config zero3.yaml] [a.b=c ...]

Resumes the run in train.out_dir; on a finished run it does nothing. Ctrl-C and SIGTERM finish the
step and save it. With loss.kd_weight=0 it trains on the text of a token store (cache.dir) alone.
"""

from __future__ import annotations

from megadistill.cli.command_line import parse
from megadistill.config import load_config


def main(argv: list[str], *, prog: str | None = None) -> int:
    arguments = parse(argv, __doc__, prog=prog)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from megadistill.preflight import dry_run_train

        dry_run_train(config)
        return 0

    from megadistill import parallel
    from megadistill.preflight import check_train
    from megadistill.train.loop import train

    _, world, _ = parallel.rank_from_environment()
    check_train(config, world=world)
    tp = config.teacher.tp if config.teacher.mode == "online" else 1
    with parallel.joined(tp=tp, **config.parallel.model_dump()) as mesh:
        return train(config, mesh).code
