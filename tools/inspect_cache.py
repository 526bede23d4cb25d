"""Show what a cache or a token store holds.

    python tools/inspect_cache.py [CACHE] [--config C] [--verify] [--json] [--plot DIR]

The same command as `megadistill inspect`; --help describes it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cli.command_line import run
from megadistill.cli.inspect import main

if __name__ == "__main__":
    sys.exit(run(main))
