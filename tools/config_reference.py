"""Print the configuration reference as Markdown, or keep it up to date in a file.

    python tools/config_reference.py
    python tools/config_reference.py --update configs/README.md
    python tools/config_reference.py --check configs/README.md

--check exits with 1 where the file is not up to date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cli.command_line import parse, run
from megadistill.config.key_reference import reference, updated
from megadistill.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--update", metavar="FILE", help="write it between the markers in FILE")
    which.add_argument("--check", metavar="FILE", help="exit with 1 where FILE is not up to date")


def main(argv: list[str]) -> int:
    args = parse(
        argv,
        "The configuration reference.",
        extra=add_arguments,
        takes_config=False,
        takes_overrides=False,
    )
    name = args.update or args.check
    if name is None:
        sys.stdout.write(reference())
        return 0
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    wanted = updated(text, file=name)
    if args.check and text != wanted:
        sys.stderr.write(f"{name}: not up to date: run it with --update {name}\n")
        return 1
    if text != wanted:
        Path(name).write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
