"""Options and checks that merging, repairing, splitting and inspecting share."""

from __future__ import annotations

import argparse
import os
from typing import Any

from megadistill.cli.command_line import count
from megadistill.inspect.inspection import block_check
from megadistill.storage.disk import is_url

# None: a bar where standard error is a terminal.
WATCHED: dict[str, Any] = {"check_of": block_check, "show_progress": None}


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """Add --workers and --json."""
    parser.add_argument(
        "--workers",
        type=count,
        default=min(16, os.cpu_count() or 1),
        help="processes that verify; default %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def refuse_url(parser: argparse.ArgumentParser, written: str) -> None:
    """Leave the program where the store to write is at a URL."""
    if is_url(written):
        parser.error(f"{written} is a URL, expected a folder: tools/copy_cache.py copies to a URL")
