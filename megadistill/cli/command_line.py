"""Functions shared by all programs: the command line, logging, and errors without a traceback.

    def main(argv: list[str], *, prog: str | None = None) -> int | None:
        args = parse(argv, "Generate the cache.", prog=prog)
        config = load_config(args.config, args.overrides)
        ...

    if __name__ == "__main__":
        sys.exit(run(main))

Imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence

from megadistill.cli.unknown_options import unknown_options
from megadistill.errors import ConfigError, MegadistillError
from megadistill.launcher import INTERRUPTED, leave_with_launcher
from megadistill.storage.progress import LineHandler

log = logging.getLogger(__name__)

SILENCE_S = 2.0  # a rank that leaves the report to another waits so long before it leaves
NOBODY_READS = 141  # what a shell gives a program that wrote into a closed pipe


def parse(
    argv: Sequence[str],
    description: str,
    *,
    prog: str | None = None,
    extra: Callable[[argparse.ArgumentParser], object] | None = None,
    takes_config: bool = True,
    takes_overrides: bool = True,
) -> argparse.Namespace:
    """The arguments, in any order: `.config`, `.overrides`, `.dry_run`, and what `extra` adds.

    prog             the command's name in its help; default: the script's
    extra            called with the parser, to add a program's own arguments
    takes_config     whether there is --config; `.config` is None where it is not given
    takes_overrides  whether `a.b=value` and --dry_run are taken

    `--local_rank=N`, which launchers add, is accepted anywhere and left unread: the rank comes from
    the environment. ConfigError over options that it does not know; leaves the program (code 2)
    over values that do not fit.
    """
    parser = new_parser(description, prog=prog)
    if takes_config:
        parser.add_argument(
            "--config",
            metavar="FILE",
            help="a file; a bare name is looked up here, then in configs/ (default: zero3.yaml)",
        )
    if extra is not None:
        extra(parser)
    if takes_overrides:
        parser.add_argument(
            "--dry_run",
            "--dry-run",
            action="store_true",
            help="make every check of the start, print the plan, and write nothing",
        )
        parser.add_argument(
            "overrides", nargs="*", metavar="a.b=value", help="keys to set, such as train.lr=1e-4"
        )
    return read_arguments(parser, argv)


def new_parser(description: str | None, *, prog: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of a command. `description` is printed as it is written."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def read_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed arguments. ConfigError with a line for each option that is unknown."""
    arguments, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        known = [o for action in parser._actions for o in action.option_strings]
        takes_overrides = hasattr(arguments, "overrides")
        lines = unknown_options(argv, unknown, known=known, takes_overrides=takes_overrides)
        raise ConfigError("\n".join(f"command line: {line}" for line in lines))
    return arguments


def count(text: str) -> int:
    """A number of things, for `type=` of an argument."""
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text}: expected a number of at least 1")


def amount(text: str) -> float:
    """How much of something, 0 or more, for `type=` of an argument."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: expected a number, 0 or more")


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """`main` as a program: logging set up, our errors as lines on stderr. Returns the exit code."""
    start_logging()
    leave_with_launcher()
    try:
        code = main(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
        return code
    except MegadistillError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        # While a program imports or checks; `parallel` handles signals from its start on.
        if _rank() == 0:
            log.warning("interrupted: what is complete stays, and the same command resumes")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read has read enough (`| head`). What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS


def start_logging() -> None:
    """Configures logging to stderr with time, host and rank: INFO from rank 0, else WARNING."""
    handler = LineHandler()
    handler.addFilter(_add_rank)
    handler.setFormatter(
        logging.Formatter(
            "%(asctime)s %(levelname)s [%(host)s rank %(rank)s] %(message)s", datefmt="%H:%M:%S"
        )
    )
    # On our own logger, not on the root: other libraries have handlers, and would speak twice.
    package = logging.getLogger("megadistill")
    package.setLevel(logging.INFO if _rank() == 0 else logging.WARNING)
    for old in [h for h in package.handlers if _add_rank in h.filters]:
        package.removeHandler(old)
    package.addHandler(handler)


def _add_rank(record: logging.LogRecord) -> bool:
    record.rank, record.host = _rank(), socket.gethostname()
    return True


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _report(error: MegadistillError) -> None:
    """A line for each mistake. Every rank finds the same mistakes in a configuration: one speaks.

    A folder may be missing on one host alone, so that the first rank of each host speaks, naming
    its host where that is not rank 0's. Of an error marked `common`, which every rank was told of,
    rank 0 speaks alone. All others may be one rank's own and are all printed.
    """
    rank, local_rank = _rank(), int(os.environ.get("LOCAL_RANK", 0))
    common = getattr(error, "common", False)
    if (common and rank != 0) or (isinstance(error, ConfigError) and local_rank != 0):
        # A launcher ends all ranks when the first leaves: let that be the one that speaks.
        time.sleep(SILENCE_S)
        return
    where = "" if rank == 0 else f"[{socket.gethostname()} rank {rank}] "
    with contextlib.suppress(OSError):  # the terminal is closed
        for line in str(error).splitlines() or [type(error).__name__]:
            sys.stderr.write(f"error: {where}{line}\n")
        sys.stderr.flush()
