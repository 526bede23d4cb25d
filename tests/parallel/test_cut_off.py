"""A host that is cut off from the others: both sides notice, and leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = """
import pathlib, sys, time
from megadistill import parallel
from megadistill.cli.command_line import run

def main(argv):
    with parallel.joined(heartbeat_s=4) as mesh:
        pathlib.Path(argv[0], f"there-{mesh.rank}").touch()
        time.sleep(300)

sys.exit(run(main))
"""
NAMES = [f"md{os.getpid()}{side}" for side in "ab"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "cable",
            "netns",
            NAMES[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            NAMES[1],
        )
        for number, name in enumerate(NAMES, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield NAMES
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr!r}")
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_ranks_whose_hosts_cannot_reach_each_other_any_more_leave(hosts, tmp_path):
    settings = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29551",
        "GLOO_SOCKET_IFNAME": "cable",
    }
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, "-c", PROGRAM, str(tmp_path)],
            env={**os.environ, **settings, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank, host in enumerate(hosts)
    ]
    try:
        while not all(Path(tmp_path, f"there-{rank}").exists() for rank in (0, 1)):
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.05)
        ip("-n", hosts[0], "link", "set", "cable", "down")
        said = [rank.communicate(timeout=30)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert "rank 1 on" in said[0], said
    assert "rank 0 on" in said[1], said
    assert all("does not answer any more: all ranks stop" in text for text in said), said
