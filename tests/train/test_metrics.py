"""Metrics of a run: speeds are counts over times, and a key of its own repeats a run to the bit."""

import json
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.stores import SEQ_LEN, make_config


def metrics(config) -> list[dict]:
    text = Path(config.train.out_dir, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def train_deterministic(mesh, config) -> bool:
    """Train; whether torch's algorithms were deterministic, which they are not left as."""
    from megadistill.train.loop import train

    try:
        train(config, mesh)
        return torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the same, with train.deterministic, and what each said of torch."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for name in ("a", "b"):
        train = {"deterministic": True, "out_dir": str(folder / name)}
        config = make_config(folder, train=train)
        said = run_ranks(1, "tests.train.test_metrics:train_deterministic", config=config)
        found.append((metrics(config), said))
    return found


def test_tokens_per_second_are_the_tokens_of_the_step_over_its_time(runs):
    records, _ = runs[0]
    before = 0
    for record in records:
        assert record["tokens"] - before == 8 * SEQ_LEN  # global_batch sequences
        expected = (record["tokens"] - before) / record["step_s"]
        assert record["tokens_per_s"] == pytest.approx(expected, rel=1e-6)
        before = record["tokens"]


def test_deterministic_runs_use_torchs_deterministic_algorithms_and_repeat_to_the_bit(runs):
    (first, said), (second, _) = runs
    assert said == [True]
    names = ("loss", "kd_loss", "ce_loss", "grad_norm", "lr")
    assert [[r[n] for n in names] for r in first] == [[r[n] for n in names] for r in second]
