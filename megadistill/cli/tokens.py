"""Tokenise the corpus into the token store (data.dir), ahead of generating. Needs no accelerator.

    megadistill tokens --config C [a.b=c ...]
    python tools/make_tokens.py --config C [a.b=c ...]

`generate` does this by itself where the store is missing. On any machine that sees the folder, this
command keeps the accelerators from waiting for it. Started again, it resumes.
"""

from __future__ import annotations

import sys

from megadistill.cli.command_line import parse
from megadistill.config import load_config, to_yaml


def main(argv: list[str], *, prog: str | None = None) -> int:
    args = parse(argv, __doc__, prog=prog)
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from megadistill.data.token_checks import check_tokens

        check_tokens(config)
        sys.stdout.write(to_yaml(config))
        return 0
    from megadistill.data.counts import statistics
    from megadistill.data.tokens import build_tokens

    store = build_tokens(config)
    counts = statistics(store)
    width = max(map(len, counts))
    sys.stdout.write(f"{store.path}\n")
    for name, value in counts.items():
        sys.stdout.write(f"  {name.replace('_', ' '):{width}} {value:>15,}\n")
    return 0
