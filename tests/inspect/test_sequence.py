"""A sequence as text: every position marked as what it is, and no line too long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megadistill.blocks import BlockReader, BlockWriter
from megadistill.cache.reader import open_cache
from megadistill.cache.writer import CacheWriter
from megadistill.inspect.sequence import sequence_facts, sequence_text
from tests.blocks.stores import BLOCK_SIZE, COLUMNS, SEQ_LEN
from tests.cache.caches import VOCAB_SIZE, fill_cache
from tests.cache.targets import make_targets


@pytest.mark.parametrize("text", ["x" * 100, "\u4e2d" * 50, "\x1b[31m\n" * 20, ""])
@pytest.mark.parametrize("width", [0, 80, 131])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, text: str, width: int) -> None:
    cache = open_cache(fill_cache(tmp_path / "c").path)
    for index in range(len(cache)):
        shown = sequence_text(sequence_facts(cache, index), text_of=lambda _: text, width=width)
        for line in shown.splitlines()[1:]:
            assert len(line) + line.count("\u4e2d") <= max(80, width), line
            assert line.isprintable()


def masked_cache(path: Path) -> BlockReader:
    store = BlockWriter.create(
        path,
        kind="cache",
        header={"recipe": {"method": "topk", "temperature": 0.7, "vocab_size": VOCAB_SIZE}},
        columns={**COLUMNS, "loss_mask": f"ndarray:uint8:{SEQ_LEN}", "targets": "bytes"},
        block_size=BLOCK_SIZE,
    )
    store.plan(1)
    sample = {
        "tokens": np.arange(SEQ_LEN, dtype=np.uint32),
        "documents": np.array([0, 5], np.uint32),
        "loss_mask": np.array([0, 0, 1, 1, 1, 0, 1, 1], np.uint8),
    }
    with CacheWriter(store) as writer:
        writer.submit(0, [sample], [make_targets("topk", positions=SEQ_LEN, vocab_size=99)])
    store.finish()
    return store


def test_documents_masks_and_what_comes_next_are_marked(tmp_path: Path) -> None:
    cache = open_cache(masked_cache(tmp_path / "cache").path)
    facts = sequence_facts(cache, 0)
    assert [p["position"] for p in facts["positions"] if p["document_begins"]] == [0, 5]
    assert [p["position"] for p in facts["positions"] if p["masked"]] == [0, 1, 5]
    assert [p["next_token"] for p in facts["positions"]] == [1, 2, 3, 4, None, 6, 7, None]
    # The true token is among what is shown however improbable it is: the least of a long row.
    row = facts["positions"][1]
    row["ids"], row["weights"] = [*range(10, 40), 2], [0.03] * 30 + [0.001]
    facts["positions"][4]["ids"] = facts["positions"][4]["weights"] = []
    lines = sequence_text(facts, text_of=None, width=80).splitlines()
    header = next(n for n, line in enumerate(lines) if line.startswith("  pos"))
    assert "m: masked, not to be learned." in lines[:header]
    rows = [line for line in lines[header + 1 :] if "-- document" not in line]
    assert [line[6] for line in rows] == list("mm   m  ")
    assert "[2 0.001]" in rows[1]
    assert rows[1].endswith(f"+{31 - rows[1].count('0.030') - 1}")
    assert rows[4].endswith("no target: nothing comes next")
    assert "-- document" in lines[header + 1]
    assert "-- document" in lines[header + 7]
