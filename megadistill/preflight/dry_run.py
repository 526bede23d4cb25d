"""Dry runs: every check of a start, then the plan. They write nothing.

Each raises what the start would raise, with the same line and exit code. Every rank checks the
files of its own host; rank 0 alone checks the stores and prints.
"""

from __future__ import annotations

from megadistill.cache.build_checks import check_build
from megadistill.config import Config
from megadistill.errors import ConfigError
from megadistill.parallel import check_hosts, hosts_from_environment, rank_from_environment
from megadistill.preflight.generating import check_generate
from megadistill.preflight.plan import show_plan
from megadistill.preflight.training import check_train
from megadistill.train.dry_run import check_run


def dry_run_generate(config: Config) -> None:
    """Dry run of `launch/generate.py` on the ranks of the environment."""
    rank, world, _ = rank_from_environment()
    check_generate(config, world=world)
    check_hosts(config.parallel.expect_hosts, hosts_from_environment())
    if rank == 0:
        check_build(config)
        show_plan(config, world=world)


def dry_run_train(config: Config) -> None:
    """Dry run of `launch/train.py` on the ranks of the environment."""
    rank, world, _ = rank_from_environment()
    known = check_train(config, world=world)
    check_hosts(config.parallel.expect_hosts, hosts_from_environment())
    if rank == 0:
        check_run(config, world=world)
        show_plan(known, world=world)


def dry_run_plan(config: Config) -> None:
    """Dry run of `tools/plan.py`, which reads neither the configured stores nor a run's folder."""
    rank, world, _ = rank_from_environment()
    require_cached(config)
    check_generate(config, world=world, writing=False)
    check_hosts(config.parallel.expect_hosts, hosts_from_environment())
    if rank == 0:
        show_plan(config, world=world)


def require_cached(config: Config) -> None:
    """ConfigError for an online teacher, whose run has no cache to plan."""
    if config.teacher.mode == "online":
        raise ConfigError(
            "teacher.mode: online keeps no cache whose size could be planned: run "
            "`launch/train.py --dry_run`, which tells what the run takes; or set "
            "teacher.mode=cached"
        )
