"""Print the configuration that a run would have, or the reference of all keys.

    megadistill config [--config zero3.yaml] [a.b=c ...]
    megadistill config --reference

The configuration is checked, complete, and printed as a file that --config takes. The reference is
Markdown: a table for each section.
"""

from __future__ import annotations

import argparse
import sys

from megadistill.cli.command_line import parse
from megadistill.config import load_config, to_yaml
from megadistill.config.key_reference import reference


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", action="store_true", help="print every key as Markdown")


def main(argv: list[str], *, prog: str | None = None) -> int:
    args = parse(argv, __doc__, prog=prog, extra=options)
    if args.reference:
        sys.stdout.write(reference())
    else:
        sys.stdout.write(to_yaml(load_config(args.config, args.overrides)))
    return 0
