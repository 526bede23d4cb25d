"""Work on many blocks in several processes, and how far it has come."""

from __future__ import annotations

import logging
import os

import pytest

from megadistill.blocks.maintenance.pool import BLOCKS_A_PROCESS, each_block
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.storage import progress
from megadistill.storage.progress import BlockProgress

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


def test_progress_is_a_bar_with_rate_and_time_to_go(capsys: pytest.CaptureFixture[str]) -> None:
    with BlockProgress("verifying", total=4, show=True) as bar:
        for block in range(4):
            bar.add(block)
        bar._bar.refresh()
    error = capsys.readouterr().err
    assert "verifying" in error
    assert "4/4" in error
    assert "blocks/s" in error


def test_progress_is_a_line_now_and_then_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Handlers that programs run by other tests left, on streams that are closed by now.
    monkeypatch.setattr(logging.getLogger("megadistill"), "handlers", [])
    caplog.set_level(logging.INFO, logger="megadistill")
    with BlockProgress("verifying", total=4) as bar:
        bar.add(0)
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
        bar.add(1)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("verifying: block 2 of 4, ")
    assert caplog.messages[0].endswith(" s to go")
    assert capsys.readouterr().err == ""
