"""The hosts that other tests stand on: what they share, what they do not, and how they fail."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import Cluster, made, wait_until
from tests.hosts.init import HOME


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from made(2, tmp_path_factory.mktemp("cluster"))


def reach(cluster: Cluster, name: str) -> bool:
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=2", name, "hostname"]
    return cluster.run("host-1", ssh).stdout.strip() == name


def test_hosts_have_names_processes_and_private_folders_of_their_own(cluster: Cluster) -> None:
    assert reach(cluster, "host-2")
    private = ("/tmp/mine", "/dev/shm/mine", f"{HOME}/mine")
    cluster.run("host-1", ["touch", *private])
    for path in private:
        assert cluster.run("host-1", ["test", "-e", path]).returncode == 0
        assert cluster.run("host-2", ["test", "-e", path]).returncode == 1
        assert not Path(path).exists()
    shared = cluster.folder / "shared"
    cluster.run("host-1", ["touch", shared])
    assert cluster.run("host-2", ["test", "-e", shared]).returncode == 0


def test_a_kill_stays_on_its_host(cluster: Cluster) -> None:
    jobs = [cluster.start(name, ["sleep", "300"]) for name in cluster.names]
    for name in cluster.names:
        wait_until(lambda name=name: cluster.processes(name, "sleep 300"), 10, "the job")
    assert cluster.kill("host-2", "sleep 300")
    assert jobs[1].wait(10) != 0
    assert cluster.processes("host-1", "sleep 300")
    jobs[0].signal(15)
    assert jobs[0].wait(10) != 0


@pytest.mark.parametrize("failure", ["cut", "silence"])
def test_a_host_that_is_cut_off_comes_back(cluster: Cluster, failure: str) -> None:
    getattr(cluster, failure)("host-2")
    assert not reach(cluster, "host-2")
    cluster.restore("host-2")
    wait_until(lambda: reach(cluster, "host-2"), 15, "host-2")


def test_a_host_without_power_ends_all_its_programs_and_boots_again(cluster: Cluster) -> None:
    job = cluster.start("host-2", ["sleep", "300"])
    assert job.pid
    cluster.power_off("host-2")
    assert job.wait(10) != 0
    assert not reach(cluster, "host-2")
    cluster.boot("host-2")
    wait_until(lambda: reach(cluster, "host-2"), 15, "host-2")
    assert not cluster.processes("host-2", "sleep 300")


def test_a_slow_host_gets_its_share_of_the_processor(cluster: Cluster) -> None:
    if not cluster.can_slow:
        pytest.skip("no writable cgroup of processors here: a host cannot be slowed")
    count = [
        "python3",
        "-c",
        "import time\nt = time.process_time()\n"
        "end = time.monotonic() + 1\nwhile time.monotonic() < end: pass\n"
        "print(time.process_time() - t)",
    ]
    cluster.slow("host-2", 0.2)
    began = time.monotonic()
    used = float(cluster.run("host-2", count).stdout)
    cluster.slow("host-2", None)
    assert used <= 0.3 * (time.monotonic() - began) + 0.1
