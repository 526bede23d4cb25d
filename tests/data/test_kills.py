"""A token store is the same whatever killed its runs, however often it grew, by any processes."""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.blocks import open_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.data.packing import best_fit
from megadistill.data.tokens import build_tokens
from tests.data.stores import same_store
from tests.data.test_tokens import TEXTS, write

LONG = [pytest.mark.long, pytest.mark.text]
SEEDS = [0, *(pytest.param(seed, marks=LONG) for seed in range(1, 21))]

# Renames and removals are the steps by which a store changes: dies before the n-th of them.
PROGRAM = """
import os, signal, sys
from megadistill.config import Config
from megadistill.data.packing import best_fit
from megadistill.data.tokens import build_tokens
best_fit.WINDOW, left = 9, [int(sys.argv[2])]
def counted(change):
    def step(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*args, **kwargs)
    return step
os.replace, os.unlink = counted(os.replace), counted(os.unlink)
build_tokens(Config.model_validate_json(sys.argv[1]))
"""


def killed(config, step: int) -> bool:
    """Whether the run died; it is through where it has fewer steps."""
    command = [sys.executable, "-c", PROGRAM, config.model_dump_json(), str(step)]
    root = Path(__file__).parents[2]
    code = subprocess.run(command, cwd=root, capture_output=True, check=False).returncode
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_store_that_grows_under_kills_is_that_of_one_undisturbed_run(
    config, tmp_path, monkeypatch, seed
):
    monkeypatch.setattr(best_fit, "WINDOW", 9)
    draw = random.Random(seed)
    texts = [text * draw.choice([1, 1, 1, 12]) for text in TEXTS]
    keys = {"files": write(tmp_path / "corpus.jsonl", texts), "block_size": draw.choice([2, 4, 7])}
    if draw.random() < 0.2:
        keys["packing"] = "in_order"
    undisturbed = build_tokens(config(**keys, dir=str(tmp_path / "undisturbed")))
    deaths = 0
    for documents in (draw.randint(10, 60), draw.randint(60, 110), None):
        settings = config(**keys, max_samples=documents, workers=draw.choice([1, 2, 5]))
        deaths += killed(settings, draw.randint(2, 150))
        build_tokens(settings)
        if documents is not None:
            shutil.rmtree(tmp_path / "alone", ignore_errors=True)
            alone = config(**keys, max_samples=documents, dir=str(tmp_path / "alone"))
            assert same_store(build_tokens(alone).path, tmp_path / "tokens")
    assert deaths
    assert same_store(tmp_path / "tokens", undisturbed.path)
    assert verify_store(open_store(tmp_path / "tokens")) == []
    assert json.loads((tmp_path / "tokens" / "tokens.json").read_text())["features"] == (
        [] if "packing" in keys else ["padding"]
    )
