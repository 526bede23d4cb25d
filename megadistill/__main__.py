"""The command `megadistill`, with a subcommand for each program of launch/ and tools/.

    megadistill COMMAND [arguments]
    python -m megadistill COMMAND [arguments]
    deepspeed [--hostfile hosts | --num_gpus N] --module megadistill COMMAND [arguments]

Imports the module of the command that is run, and no other: `--help` and a mistyped command cost no
torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from megadistill import __version__
from megadistill.cli.command_line import new_parser, run
from megadistill.config.suggest import closest
from megadistill.errors import ConfigError

# Each is a module of megadistill/cli, here in the order of their use.
COMMANDS = {
    "generate": "run the teacher over a corpus and write the cache of its targets",
    "train": "train a student from a cache or with an online teacher",
    "tokens": "tokenise the corpus ahead of generating",
    "run": "start generate or train on the hosts of a hostfile, and again after a failure",
    "plan": "estimate bytes, time and cost of a run",
    "inspect": "show and verify what a cache or a token store holds",
    "merge": "merge caches of one recipe into one",
    "split": "split a cache into parts",
    "repair": "drop the damaged blocks of a cache",
    "retruncate": "make a cache with fewer entries per token, without the teacher",
    "copy": "copy a cache to a URL, from one, or between folders",
    "report": "show training runs as a table and a picture",
    "config": "print the resolved configuration, or the reference of all keys",
}
# Names of the programs in launch/ and tools/ that differ.
SCRIPTS = {
    "config_reference": "config",
    "copy_cache": "copy",
    "inspect_cache": "inspect",
    "make_tokens": "tokens",
    "merge_and_inspect": "merge",
    "retruncate_cache": "retruncate",
}


def main() -> int:
    """Run the command line. Returns the exit code of the command."""
    return run(dispatch)


def dispatch(argv: list[str]) -> int:
    """Run the command that argv names. Launchers put --local_rank before it, which is left unread.

    ConfigError for a name that is no command.
    """
    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return ConfigError.exit_code
    args = parser.parse_args(argv)
    if args.command not in COMMANDS:
        name = args.command.rpartition("/")[2].removesuffix(".py")
        near = SCRIPTS.get(name) or closest(name, COMMANDS)
        hint = f", did you mean {near}?" if near else f", expected one of {', '.join(COMMANDS)}"
        raise ConfigError(f"command line: {args.command}: unknown command{hint}")
    command = importlib.import_module(f"megadistill.cli.{args.command}")
    code: int = command.main(args.arguments, prog=f"megadistill {args.command}")
    return code


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = new_parser(
        "Distil large language models from a cache of sparse teacher targets.\n\n"
        f"commands:\n{commands}\n\n"
        "`megadistill COMMAND --help` describes a command. On several ranks:\n"
        "deepspeed [--hostfile hosts | --num_gpus N] --module megadistill COMMAND ...",
        prog="megadistill",
    )
    parser.usage = "megadistill [-h] [--version] COMMAND ..."
    parser.add_argument("--version", action="version", version=f"megadistill {__version__}")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
