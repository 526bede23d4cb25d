"""A rank leaves with its launcher, also before it has joined the others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# Started as `deepspeed` does it: the command starts a launcher, which starts the rank.
STARTS = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])\n"
RANK = """
import pathlib, sys, time
from megadistill.cli.command_line import run

def main(argv):
    pathlib.Path(argv[0], "there").touch()
    time.sleep(300)

sys.exit(run(main))
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_still_imports_leaves_with_either_of_deepspeeds_launchers(tmp_path, killed):
    for name in ("deepspeed", "deepspeed_launch"):
        (tmp_path / name).write_text(STARTS)
    (tmp_path / "rank.py").write_text(RANK)
    command = [str(tmp_path / name) for name in ("deepspeed", "deepspeed_launch", "rank.py")]
    with subprocess.Popen(
        [sys.executable, *command, str(tmp_path)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RANK": "0", "PYTHONPATH": str(Path.cwd())},
    ) as outer:
        while not (tmp_path / "there").exists():
            time.sleep(0.02)
        chain = [psutil.Process(outer.pid), *psutil.Process(outer.pid).children(recursive=True)]
        assert len(chain) == 3
        os.kill(chain[killed].pid, signal.SIGKILL)
        alive = psutil.wait_procs(chain[1:], timeout=20)[1]
        for process in alive:
            process.kill()
        assert alive == []


def test_a_parent_outside_of_the_process_namespace_is_no_launcher():
    """As after `docker exec` or `nsenter`, where the kernel gives 0 for the parent."""
    ask = (
        "import os; from megadistill.launcher import launcher_is_there\n"
        "print(os.getppid(), launcher_is_there())"
    )
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", ask]
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    done = subprocess.run(
        unshare,
        capture_output=True,
        text=True,
        env={**os.environ, "RANK": "0", "PYTHONPATH": str(Path.cwd())},
    )
    assert (done.stdout, done.stderr) == ("0 True\n", "")
