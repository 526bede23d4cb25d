"""Tokenise the corpus into the token store (data.dir), ahead of generating. Needs no accelerator.

    python tools/make_tokens.py --config C [a.b=c ...]

generate.py does this by itself where the store is missing; doing it here, on any machine that sees
the folder, keeps the accelerators from waiting for it. Started again, it resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cli.command_line import parse, run
from megadistill.config import load_config, to_yaml


def main(argv: list[str]) -> int:
    args = parse(argv, "Tokenise the corpus into the token store.")
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


if __name__ == "__main__":
    sys.exit(run(main))
