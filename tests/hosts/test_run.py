"""`megadistill run` over real hosts: what it refuses, what it takes along, what it starts again."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import Cluster, Job, made, wait_until
from tests.hosts.runs import SMALL, blocks, clear, environment, models
from tests.programs import ROOT

pytestmark = pytest.mark.launcher
RUN = ["python", str(ROOT / "launch" / "run.py")]
STORES = ["data.dir=tokens", "cache.dir=cache"]
# Blocks of one sequence, so that there is time to fail in.
LONG = [*SMALL, *STORES, "data.max_samples=8", "data.block_size=1", "parallel.heartbeat_s=6"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("hosts")
    models(folder)
    yield from made(2, folder)


@pytest.fixture
def folder(cluster: Cluster) -> Path:
    """The cluster's folder, without what an earlier test made."""
    clear(cluster.folder, "tokens", "cache", "alone-tokens", "alone")
    return cluster.folder


def start(cluster: Cluster, *words: str, hostfile: Path | None = None) -> Job:
    hosts = ["--hostfile", str(hostfile or cluster.hostfile())]
    return cluster.start("host-1", [*RUN, *hosts, *words], cwd=cluster.folder, env=environment())


def alone(cluster: Cluster, *words: str) -> dict[str, bytes]:
    """The bytes of the cache that one rank of one host makes."""
    program = ["python", str(ROOT / "launch" / "generate.py"), *words]
    stores = ["data.dir=alone-tokens", "cache.dir=alone"]
    job = cluster.start("host-1", [*program, *stores], cwd=cluster.folder, env=environment())
    assert job.wait(180) == 0, job.text
    return blocks(cluster.folder / "alone")


def committed(folder: Path) -> int:
    return len(list((folder / "cache" / "blocks").glob("*.json")))


def test_two_hosts_make_the_bytes_of_one(cluster: Cluster, folder: Path) -> None:
    job = start(cluster, "generate", *SMALL, *STORES)
    assert job.wait(120) == 0, job.text
    assert "starting 2 rank(s) on 2 host(s): host-1, host-2" in job.text
    assert blocks(folder / "cache") == alone(cluster, *SMALL)


def test_hosts_that_cannot_take_part_are_named_before_anything_starts(
    cluster: Cluster, folder: Path
) -> None:
    hostfile = folder / "odd"
    address = cluster.address("host-2")
    hostfile.write_text(f"host-1 slots=1\nhost-2 slots=1\n{address} slots=1\nhost-9 slots=1\n")
    twice = start(cluster, "generate", *SMALL, *STORES, hostfile=hostfile)
    assert twice.wait(60) == 2
    assert "10.77.0.2: is the machine that host-2 is: keep one of the two names" in twice.text
    assert "host-9: ssh does not reach it: ssh: Could not resolve hostname" in twice.text
    private = Path("/tmp/only-here")
    cluster.run("host-1", ["mkdir", private])
    there = [*RUN, "--hostfile", str(cluster.hostfile()), "generate"]
    elsewhere = cluster.start(
        "host-1",
        [*there, *SMALL, f"teacher.model={folder}/teacher", f"student.model={folder}/student"],
        cwd=private,
        env=environment(),
    )
    assert elsewhere.wait(60) == 2
    assert "host-2: has no folder /tmp/only-here, where this run was started" in elsewhere.text
    assert not (folder / "tokens").exists()
    assert not (folder / "cache").exists()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_takes_the_ranks_of_all_hosts_along(cluster: Cluster, folder: Path, number: int) -> None:
    job = start(cluster, "generate", *LONG)
    wait_until(lambda: committed(folder) > 8, 120, "blocks")
    job.signal(number)
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143}
    code = job.wait(30)
    assert number == signal.SIGKILL or code == codes[number], job.text
    for name in cluster.names:
        wait_until(lambda name=name: not cluster.processes(name, "megadistill"), 25, "the end")


@pytest.mark.long
def test_a_host_without_power_is_done_without(cluster: Cluster, folder: Path) -> None:
    job = start(cluster, "--max_restarts", "1", "--min_hosts", "1", "generate", *LONG)
    wait_until(lambda: committed(folder) > 8, 120, "blocks")
    cluster.power_off("host-2")
    try:
        assert job.wait(300) == 0, job.text
    finally:
        cluster.boot("host-2")
    assert "starting 1 rank(s) on 1 host(s): host-1" in job.text
    assert blocks(folder / "cache") == alone(cluster, *LONG)


@pytest.mark.long
def test_a_killed_rank_is_started_again_on_all_hosts(cluster: Cluster, folder: Path) -> None:
    job = start(cluster, "--max_restarts", "1", "generate", *LONG)
    wait_until(lambda: committed(folder) > 8, 120, "blocks")
    assert cluster.kill("host-2", "-u -m megadistill")
    assert job.wait(180) == 0, job.text
    assert job.text.count("starting 2 rank(s) on 2 host(s)") == 2
    assert blocks(folder / "cache") == alone(cluster, *LONG)


@pytest.mark.long
def test_other_code_on_a_host_is_refused(cluster: Cluster, folder: Path) -> None:
    # A checkout under /tmp of each host, so that the two may differ.
    for name in cluster.names:
        cluster.run(name, ["cp", "-r", ROOT / "megadistill", "/tmp/megadistill"])
        cluster.run(name, ["cp", "-r", ROOT / "configs", "/tmp/configs"])
    cluster.run("host-2", ["sh", "-c", "echo '# changed' >> /tmp/megadistill/errors.py"])
    command = ["python", "-m", "megadistill", "run", "--hostfile", str(cluster.hostfile())]
    job = cluster.start(
        "host-1",
        [*command, "generate", *SMALL, *STORES],
        cwd=folder,
        env=environment() | {"PYTHONPATH": "/tmp"},
    )
    assert job.wait(60) == 2
    assert "host-2: /tmp holds other code than here" in job.text
    shutil.rmtree(folder / "tokens", ignore_errors=True)
