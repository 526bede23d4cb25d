"""Copy a cache to a URL, from one, or between folders.

    python tools/copy_cache.py SOURCE DEST [--verify] [--workers N]

The same command as `megadistill copy`; --help describes it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cli.command_line import run
from megadistill.cli.copy import main

if __name__ == "__main__":
    sys.exit(run(main))
