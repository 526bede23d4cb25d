"""Work on many blocks in several processes, and how far it has come."""

from __future__ import annotations

import os

import pytest

from megadistill.blocks.maintenance.pool import BLOCKS_A_PROCESS, each_block
from megadistill.errors import CorruptBlockError, StoreError

MANY = list(range(5 * BLOCKS_A_PROCESS))


def named(context: str, item: int) -> tuple[str, int]:
    if context == "dies":
        os._exit(1)
    if context == "fails" and item == 11:
        raise CorruptBlockError("shard.000011.mds", "a block", "another")
    return f"{context} {item}", os.getpid()


def test_results_come_in_order_from_other_processes() -> None:
    found = list(each_block(named, "block", MANY, workers=2))
    assert [name for name, _ in found] == [f"block {i}" for i in MANY]
    assert os.getpid() not in {process for _, process in found}


def test_few_blocks_are_done_without_a_process() -> None:
    for items, workers in ((MANY[: 2 * BLOCKS_A_PROCESS - 1], 2), (MANY, 1), ([], 4)):
        found = list(each_block(named, "block", items, workers=workers))
        assert [process for _, process in found] == [os.getpid()] * len(items)


def test_an_error_is_raised_as_it_was() -> None:
    with pytest.raises(CorruptBlockError, match="expected a block, found another"):
        list(each_block(named, "fails", MANY, workers=2))


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(StoreError, match="a process that checked blocks died"):
        list(each_block(named, "dies", MANY, workers=2))
