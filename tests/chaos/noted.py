"""A program for tests: launch/generate.py, writing down which blocks it begins.

noted.py NOTES [arguments of launch/generate.py]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.chaos.harness import generate

if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    sys.exit(generate(arguments[1:], arguments[0]))
