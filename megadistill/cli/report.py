"""Shows a training run, or several beside one another: curves as a picture, a table as Markdown.

    megadistill report RUN [--out DIR]
    megadistill report RUN RUN ... --out DIR
    python tools/report.py RUN ... [--out DIR]

RUN is a run's train.out_dir; the run may still be going on. Prints the table, and writes report.md
and report.png to DIR, for a single run by default its own folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megadistill.cli.command_line import parse
from megadistill.errors import ConfigError, StoreError
from megadistill.inspect.training_report import read_runs, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a training run's folder")
    parser.add_argument("--out", metavar="DIR", help="where report.md and report.png go")


def main(argv: list[str], *, prog: str | None = None) -> int:
    args = parse(
        argv, __doc__, prog=prog, extra=add_arguments, takes_config=False, takes_overrides=False
    )
    if args.out is None and len(args.runs) > 1:
        raise ConfigError(
            f"--out: is not given, and {len(args.runs)} runs have no folder in common: name one "
            "for report.md and report.png"
        )
    runs = read_runs(args.runs)
    out = Path(args.out or args.runs[0])
    print(report(runs), end="")
    from megadistill.inspect.training_plots import plot_runs

    picture = plot_runs(runs, out / "report.png")
    text = out / "report.md"
    try:
        text.write_text(report(runs, picture=picture.name))
    except OSError as error:
        raise StoreError(f"{text}: cannot be written: {error.strerror or error}") from error
    for file in (text, picture):
        print(file, file=sys.stderr)
    return 0
