"""Show training runs as a table and a picture.

    python tools/report.py RUN [RUN ...] [--out DIR]

The same command as `megadistill report`; --help describes it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cli.command_line import run
from megadistill.cli.report import main

if __name__ == "__main__":
    sys.exit(run(main))
