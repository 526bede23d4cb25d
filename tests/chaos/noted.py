"""A program for tests: launch/generate.py, writing down which blocks it begins.

noted.py NOTES [arguments of launch/generate.py]

Like launch/generate.py it watches its launcher before it imports what takes long.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megadistill.launcher import leave_with_launcher

if __name__ == "__main__":
    leave_with_launcher()
    notes, *arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    Path(notes, f"watching-{os.environ['RANK']}").touch()

    from tests.chaos.harness import generate

    sys.exit(generate(arguments, notes))
