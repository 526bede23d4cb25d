"""Keys of the section `parallel`: each does what its sentence says, on one rank of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
from megadistill import parallel
from megadistill.cli.command_line import run
from megadistill.config import load_config

def main(argv):
    config = load_config("demo.yaml", argv)
    with parallel.joined(**config.parallel.model_dump()) as mesh:
        group = torch.distributed.distributed_c10d._get_default_group()
        options = group._get_backend(torch.device("cpu")).options
        heartbeat_s = parallel.ranks._WATCHDOG[0]._heartbeat_s
        print(torch.get_num_threads(), int(options._timeout.total_seconds()), heartbeat_s)

sys.exit(run(main))
"""


def program(*settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *settings],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_threads_timeout_and_heartbeat_are_those_of_the_configuration():
    ran = program(
        "parallel.cpu_threads=3",
        "parallel.timeout_s=77",
        "parallel.heartbeat_s=9",
        "parallel.expect_hosts=1",
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["3", "77", "9"]


@pytest.mark.parametrize("expected", [2, 5])
def test_another_number_of_hosts_is_refused(expected):
    ran = program(f"parallel.expect_hosts={expected}")
    assert ran.returncode == 2
    assert f"parallel.expect_hosts: expected {expected} hosts, found 1 (" in ran.stderr
    assert "Traceback" not in ran.stderr
