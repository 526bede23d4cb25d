"""Measure: ratios within one run. `python tools/bench.py --help` lists the measures.

    python tools/bench.py MEASURE [--json]
    deepspeed --num_gpus 2 tools/bench.py step

The measures stay in the package, megadistill/bench: mypy, the contract of imports and the tests'
mirror reach them there without a second package root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.bench.commands import main
from megadistill.cli.command_line import run

if __name__ == "__main__":
    sys.exit(run(main))
