"""Start generate or train on all hosts of a hostfile, and again after a failure.

    python launch/run.py [--hostfile hosts] [--max_restarts N] generate --config zero3.yaml [a.b=c]
    megadistill run      [--hostfile hosts] [--max_restarts N] train    --config zero3.yaml [a.b=c]

Reaches every host over ssh first, and names those that cannot take part. The hosts need the same
interpreter and the same code at the same paths, and see the same folders. Ends with the ranks, with
their exit code; told to stop (Ctrl-C, SIGTERM) or killed, it takes the ranks of all hosts along.
Without --hostfile the ranks run on this host.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
from pathlib import Path

from megadistill.cli.command_line import count, new_parser, parse, read_arguments
from megadistill.config import Config, load_config
from megadistill.errors import ConfigError
from megadistill.launching.hostfile import Host, read_hostfile
from megadistill.launching.probe import accelerators
from megadistill.launching.rounds import Launch, run
from megadistill.storage.lock import RUN_LOCK, store_lock

COMMANDS = ("generate", "train")


def main(argv: list[str], *, prog: str | None = None) -> int:
    options, command, arguments = _split(argv, prog)
    module = importlib.import_module(f"megadistill.cli.{command}")
    extra = getattr(module, "options", None)
    parsed = parse(arguments, module.__doc__ or "", prog=f"megadistill {command}", extra=extra)
    if parsed.dry_run:
        code: int = module.main(arguments)
        return code
    config = load_config(parsed.config, parsed.overrides)
    hosts = _hosts(options)
    if options.min_hosts is not None and options.min_hosts > len(hosts):
        raise ConfigError(
            f"--min_hosts: {options.min_hosts}, expected at most the {len(hosts)} hosts that "
            f"{options.hostfile or 'this run'} names"
        )
    return run(
        Launch(
            hosts=hosts,
            command=[command, *arguments],
            max_restarts=options.max_restarts,
            min_hosts=options.min_hosts,
            ssh=shlex.split(options.ssh),
            cwd=Path.cwd(),
            master_port=options.master_port,
            locks=_locks(command, config),
        )
    )


def _split(argv: list[str], prog: str | None) -> tuple[argparse.Namespace, str, list[str]]:
    """The options of this command, the command to start, and its arguments."""
    parser = new_parser(__doc__, prog=prog)
    parser.usage = f"{parser.prog} [options] generate|train [arguments of that command]"
    parser.add_argument("--hostfile", metavar="FILE", help="a line `name slots=N` a host")
    parser.add_argument(
        "--num_ranks",
        "--num_gpus",
        type=count,
        metavar="N",
        help="without --hostfile: ranks on this host (default: its accelerators, or 1)",
    )
    parser.add_argument(
        "--max_restarts",
        type=_restarts,
        default=0,
        metavar="N",
        help="start again so often after a lost host, a killed rank or another failure",
    )
    parser.add_argument(
        "--min_hosts",
        type=count,
        metavar="M",
        help="start with M reachable hosts or more (default: all of the hostfile)",
    )
    parser.add_argument(
        "--ssh", default="ssh", metavar="COMMAND", help="for example 'ssh -p 2222 -l me'"
    )
    parser.add_argument(
        "--master_port", type=count, metavar="PORT", help="where ranks meet (default: a free one)"
    )
    at = next((i for i, word in enumerate(argv) if word in COMMANDS), len(argv))
    options = read_arguments(parser, argv[:at])
    if at == len(argv):
        raise ConfigError(f"command line: expected {' or '.join(COMMANDS)} after the options")
    if options.hostfile and options.num_ranks:
        raise ConfigError("command line: --num_ranks: the hostfile's slots say it: leave one out")
    return options, argv[at], argv[at + 1 :]


def _restarts(text: str) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text}: expected a number, 0 or more")


def _hosts(options: argparse.Namespace) -> list[Host]:
    if options.hostfile:
        return read_hostfile(options.hostfile)
    return [Host("localhost", options.num_ranks or accelerators() or 1)]


def _locks(command: str, config: Config) -> list[Path]:
    """The locks that the run takes, as its stores and its run folder name them."""
    if command == "train":
        return [Path(config.train.out_dir) / RUN_LOCK]
    return [store_lock(Path(folder)) for folder in (config.data.dir, config.cache.folder)]
