"""A distribution of others through the real launchers, from its corpus to a trained model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megadistill.blocks import open_store
from tests.data.sources.test_outside_source import MODULE as DATA_SOURCE
from tests.launch.test_launch import ROOT, SMALL, SMALL_TRAINING, place, succeed
from tests.outside import make_distribution
from tests.ports import free_port
from tests.targets.test_outside_method import NAME, SOURCE
from tests.train.outside import MODULE as TRAINING

__all__ = ["place"]  # a fixture

pytestmark = pytest.mark.launcher

ENTRY_POINTS = {
    f"method.{NAME}": "tiny_everything:AT_LEAST",
    "source.counting": "tiny_source:COUNTING",
    "divergence.hellinger": "tiny_training:HELLINGER",
    "optimizer.momentum": "tiny_training:MOMENTUM",
}


def test_what_another_distribution_adds_goes_from_its_corpus_to_a_model(
    place, tmp_path, monkeypatch
):
    """A data source, a method of targets, a divergence and an optimizer, on two ranks."""
    folder = make_distribution(tmp_path, "tiny-everything", ENTRY_POINTS, module=SOURCE)
    (folder / "tiny_source.py").write_text(DATA_SOURCE)
    (folder / "tiny_training.py").write_text(TRAINING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(folder)]))
    settings = [each for each in SMALL if not each.startswith(("data.source", "data.max_samples"))]
    settings += ["data.source=counting", "data.options.documents=60", "data.dir=runs/tokens"]
    # Another test has DeepSpeed's own port at the same time.
    launch = ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()))
    method = (f"targets.method={NAME}", "targets.options.least=0.001")
    succeed(place, *launch, "launch/generate.py", *settings, *method, "cache.dir=runs/outside")

    inspect = ("python", "tools/inspect_cache.py", "--verify", "--json")
    found = json.loads(succeed(place, *inspect, "runs/outside"))
    assert (found["complete"], found["method"]) == (True, NAME)
    assert found["parameters"]["options"] == {"least": 0.001, "most": 8}
    source = open_store(place / "runs/tokens").recipe["source"]
    assert (source["source"], source["distribution"]) == ("counting", "tiny-everything")

    cut = ("python", "tools/retruncate_cache.py", "runs/outside", "--out", "runs/smaller")
    succeed(place, *cut, "--option", "least=0.05")
    smaller = json.loads(succeed(place, *inspect, "runs/smaller"))
    assert 1 <= smaller["entries_per_position"] < found["entries_per_position"]

    train = [*SMALL_TRAINING, "train.out_dir=runs/trained", "cache.dir=runs/smaller"]
    train += ["loss.divergence=hellinger", "loss.options.scale=2"]
    train += ["train.optimizer=momentum", "train.optimizer_options.momentum=0.9"]
    succeed(place, *launch, "launch/train.py", *settings, *train)
    lines = Path(place, "runs/trained/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert Path(place, "runs/trained/model/model.safetensors").exists()
