"""Training as a whole: real engines, one and two ranks."""

import json

from megadistill.train.loop import train
from tests.ranks import run_ranks
from tests.train.stores import make_config


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_here(mesh, config):
    return train(config, mesh).done


def test_first(tmp_path):
    config = make_config(tmp_path)
    assert run_ranks(2, "tests.train.test_loop:train_here", config=config) == [4, 4]
    for m in metrics(tmp_path / "out"): print(m)
    import os
    for r, d, f in os.walk(tmp_path / "out"): print(r, f)
