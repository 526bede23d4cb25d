"""Estimate bytes, time and cost of a run.

    python tools/plan.py [--config zero3.yaml] [a.b=c ...] [--price 2.5] [--json]

The same command as `megadistill plan`; --help describes it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cli.command_line import run
from megadistill.cli.plan import main

if __name__ == "__main__":
    sys.exit(run(main))
