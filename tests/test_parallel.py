"""Ranks: the mesh, and what every other multi-rank test relies on."""

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
    assert run_ranks(2, "tests.test_parallel:where", tp=2) == [
        (0, 0, 1, 1.0, "from 0"),
        (1, 0, 1, 1.0, "from 0"),
    ]
    assert run_ranks(2, "tests.test_parallel:where", tp=1) == [
        (0, 0, 2, 1.0, "from 0"),
        (0, 1, 2, 1.0, "from 1"),
    ]


def test_a_failing_rank_fails_the_call():
    with pytest.raises(RankError, match="planted"):
        run_ranks(2, "tests.test_parallel:fail_on_rank_one")


def test_tp_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(ConfigError, match=r"teacher\.tp: 2 does not divide the 3 ranks"):
        parallel.check_layout(tp=2, world=3)
