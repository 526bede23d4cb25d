"""Train a student.

    deepspeed [--hostfile hosts | --num_gpus N] launch/train.py [--config zero3.yaml] [a.b=c ...]

The same command as `megadistill train`; --help describes it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megadistill.cli.command_line import run
from megadistill.cli.train import main

if __name__ == "__main__":
    sys.exit(run(main))
