"""Start generate or train on many hosts.

    python launch/run.py [--hostfile hosts] generate|train [--config zero3.yaml] [a.b=c ...]

The same command as `megadistill run`; --help describes it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cli.command_line import run
from megadistill.cli.run import main

if __name__ == "__main__":
    sys.exit(run(main))
