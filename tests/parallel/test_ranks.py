"""Ranks: the mesh, and what every other multi-rank test relies on."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from megadistill import parallel
from megadistill.errors import ConfigError
from tests.ranks import RankError, run_ranks


def where(mesh):
    total = mesh.sum(torch.tensor([float(mesh.rank)]))
    said = mesh.broadcast(f"from {mesh.dp_rank}", group=mesh.tp_group)
    return mesh.tp_rank, mesh.dp_rank, mesh.dp, total.item(), said


def fail_on_rank_one(mesh):
    if mesh.rank == 1:
        raise ValueError("planted")
    return mesh.rank


def test_consecutive_ranks_form_a_tensor_parallel_group():
    assert run_ranks(2, "tests.parallel.test_ranks:where", tp=2) == [
        (0, 0, 1, 1.0, "from 0"),
        (1, 0, 1, 1.0, "from 0"),
    ]
    assert run_ranks(2, "tests.parallel.test_ranks:where", tp=1) == [
        (0, 0, 2, 1.0, "from 0"),
        (0, 1, 2, 1.0, "from 1"),
    ]


def test_a_failing_rank_fails_the_call():
    with pytest.raises(RankError, match="planted"):
        run_ranks(2, "tests.parallel.test_ranks:fail_on_rank_one")


def rank_zero_decides(mesh, error=None):
    def work():
        if error is not None:
            raise error
        return "decided"

    try:
        return mesh.run_on_rank0(work)
    except Exception as raised:  # noqa: BLE001 - what it is is what is tested
        return type(raised).__name__, str(raised)


def test_rank_zero_works_alone_and_all_ranks_get_what_it_returned_or_raised():
    decide = "tests.parallel.test_ranks:rank_zero_decides"
    assert run_ranks(2, decide) == ["decided", "decided"]
    ours = ConfigError("a line")
    assert run_ranks(2, decide, error=ours) == [("ConfigError", "a line")] * 2


def test_a_bug_on_rank_zero_ends_the_others_without_a_traceback_of_their_own():
    assert run_ranks(2, "tests.parallel.test_ranks:rank_zero_decides", error=KeyError("k")) == [
        ("KeyError", "'k'"),
        ("MegadistillError", "rank 0 failed: KeyError"),
    ]


def test_tp_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(ConfigError, match=r"teacher\.tp: 2 does not divide the 3 ranks"):
        parallel.check_layout(tp=2, world=3)


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run(
            [sys.executable, "-c", "from megadistill import parallel; parallel.start()"],
            env={
                **os.environ,
                "RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(taken.getsockname()[1]),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert "MegadistillError: the ranks cannot meet at 127.0.0.1" in done.stderr
    assert "--master_port" in done.stderr
