"""A cache that two hosts make is the one that one rank makes, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import Cluster, made
from tests.hosts.runs import SMALL, blocks, deepspeed, environment, models
from tests.programs import ROOT

pytestmark = pytest.mark.launcher
GENERATE = str(ROOT / "launch" / "generate.py")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("hosts")
    models(folder)
    yield from made(2, folder)


def test_two_hosts_make_the_bytes_of_one(cluster: Cluster) -> None:
    folder: Path = cluster.folder
    one = cluster.start(
        "host-1",
        ["python", GENERATE, *SMALL, "data.dir=t1", "cache.dir=c1"],
        cwd=folder,
        env=environment(),
    )
    assert one.wait(120) == 0, one.text
    two = deepspeed(
        cluster, GENERATE, *SMALL, "data.dir=t2", "cache.dir=c2", "parallel.expect_hosts=2"
    )
    assert two.wait(180) == 0, two.text
    assert "2 host(s)" in two.text
    assert blocks(folder / "c2") == blocks(folder / "c1")
    assert blocks(folder / "t2") == blocks(folder / "t1")
