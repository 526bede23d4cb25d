"""Shows what a cache or a token store holds, and whether it is whole.

    megadistill inspect [CACHE] [--config C] [--verify] [--json] [--plot DIR]
    megadistill inspect CACHE --diff OTHER [--json]
    megadistill inspect CACHE --show I [--positions A:B] [--tokenizer NAME] [--json]

tools/inspect_cache.py takes the same.

Exit code 0: complete and sound; with --diff: of equal content. 1: incomplete or damaged; different.
2: cannot be read.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shutil
import sys
from typing import TYPE_CHECKING

from megadistill.blocks import open_store
from megadistill.cli.answer import answer
from megadistill.cli.command_line import new_parser, read_arguments
from megadistill.cli.stores import add_store_options
from megadistill.errors import ConfigError
from megadistill.inspect.cache_tables import difference_table, table
from megadistill.inspect.inspection import inspect_store
from megadistill.storage.progress import BlockProgress

if TYPE_CHECKING:
    from megadistill.cache.reader import Cache
    from megadistill.config import Config
    from megadistill.inspect.sequence import Text

log = logging.getLogger("megadistill.inspect")


def main(argv: list[str], *, prog: str | None = None) -> int:
    args = parse(argv, prog)
    # What the terminal's encoding lacks is shown escaped, rather than ending the program.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    config = configured(args)
    path = args.cache if config is None or args.cache else one_cache(config)
    if args.diff:
        return diff(path, args)
    if args.show is not None:
        return show(path, args, config)
    return inspect(path, args)


def one_cache(config: Config) -> str:
    sources = config.cache.sources
    if len(sources) > 1:
        raise ConfigError(
            f"cache.dir: is a list of {len(sources)} caches: name the one to inspect, for example "
            f"{sources[0].dir}"
        )
    return sources[0].dir


def parse(argv: list[str], prog: str | None) -> argparse.Namespace:
    parser = new_parser(__doc__, prog=prog)
    parser.add_argument(
        "cache", nargs="?", metavar="CACHE", help="a folder or a URL; default: the configured one"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change the configuration")
    parser.add_argument("--config", help="whose cache.dir to inspect; default zero3.yaml")
    parser.add_argument("--verify", action="store_true", help="read and check every byte")
    add_store_options(parser)
    parser.add_argument("--plot", metavar="DIR", help="write pictures over the blocks there")
    parser.add_argument("--diff", metavar="OTHER", help="what differs between CACHE and OTHER")
    parser.add_argument(
        "--show",
        metavar="I",
        type=int,
        help="sequence I as text, the teacher's top tokens beside it",
    )
    parser.add_argument("--positions", metavar="A:B", help="of the sequence, those from A up to B")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="whose text to show, a folder or a hub id; default: --config's, else ids",
    )
    args = read_arguments(parser, argv)
    if args.cache and "=" in args.cache.partition("://")[0] and not os.path.exists(args.cache):
        args.cache, args.overrides = None, [args.cache, *args.overrides]
    if args.diff and args.show is not None:
        parser.error("--diff and --show are two questions: ask one at a time")
    if args.show is None and (args.positions or args.tokenizer):
        parser.error("--positions and --tokenizer go with --show")
    return args


def configured(args: argparse.Namespace) -> Config | None:
    """The configuration, where an argument or a missing CACHE asks for one."""
    if args.cache and not args.config and not args.overrides:
        return None
    from megadistill.config import load_config

    return load_config(args.config, args.overrides)


def inspect(path: str, args: argparse.Namespace) -> int:
    if args.verify:
        with BlockProgress("verifying", total=len(open_store(path).present())) as bar:
            facts = inspect_store(path, verify=True, workers=args.workers, progress=bar.add)
    else:
        facts = inspect_store(path)
    answer(facts, lambda: table(facts), as_json=args.json)
    if args.plot:
        from megadistill.inspect.cache_plots import plot_store

        for file in plot_store(path, args.plot):
            print(file, file=sys.stderr)
    return 0 if facts["complete"] else 1


def diff(path: str, args: argparse.Namespace) -> int:
    from megadistill.inspect.difference import diff_stores

    facts = diff_stores(path, args.diff)
    answer(facts, lambda: difference_table(facts), as_json=args.json)
    return 0 if facts["equal"] else 1


def show(path: str, args: argparse.Namespace, config: Config | None) -> int:
    from megadistill.cache.reader import open_cache
    from megadistill.inspect.sequence import sequence_facts, sequence_text

    cache = open_cache(path)
    facts = sequence_facts(cache, args.show, args.positions)
    text_of = None if args.json else texts(args, config, cache)
    width = shutil.get_terminal_size((100, 24)).columns
    answer(facts, lambda: sequence_text(facts, text_of=text_of, width=width), as_json=args.json)
    return 0


def texts(args: argparse.Namespace, config: Config | None, cache: Cache) -> Text | None:
    """How ids are told as text; None where no tokenizer is named."""
    from megadistill.data.token_text import token_text
    from megadistill.data.tokenizer import load_tokenizer, open_tokenizer, tokenizer_identity

    if args.tokenizer is not None:
        tokenizer = open_tokenizer(args.tokenizer, key="--tokenizer")
    elif config is not None:
        tokenizer = load_tokenizer(config)
    else:
        return None
    found = tokenizer_identity(tokenizer)["content"]
    recipe = cache.recipe.get("tokenizer") or {}
    if recipe.get("content") != found:
        log.warning(
            "%s: made with the tokenizer %s, this one is %s: the text may be another",
            cache.path,
            recipe.get("content"),
            found,
        )
    return token_text(tokenizer)
