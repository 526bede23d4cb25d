"""Make a cache with fewer entries per token, without the teacher.

    python tools/retruncate_cache.py CACHE --out OUT (--tau X | --k K | --p P)

The same command as `megadistill retruncate`; --help describes it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cli.command_line import run
from megadistill.cli.retruncate import main

if __name__ == "__main__":
    sys.exit(run(main))
