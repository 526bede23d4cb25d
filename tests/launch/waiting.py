"""A program for tests: joins the other ranks, says so, and waits to be stopped."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megadistill import parallel

mesh = parallel.start()
Path(sys.argv[-1], f"rank-{mesh.rank}").touch()
time.sleep(300)
