"""Tokenise the corpus into the token store.

    python tools/make_tokens.py --config C [a.b=c ...]

The same command as `megadistill tokens`; --help describes it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cli.command_line import run
from megadistill.cli.tokens import main

if __name__ == "__main__":
    sys.exit(run(main))
