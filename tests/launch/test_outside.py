"""A distribution of others through the real launchers: its method from generating to training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.launch.test_launch import ROOT, SMALL, SMALL_TRAINING, place, succeed
from tests.targets.test_outside_method import NAME, tiny

__all__ = ["place"]  # a fixture

pytestmark = pytest.mark.launcher


def test_an_outside_method_goes_from_generating_to_a_model(place, tmp_path, monkeypatch):
    folder = tiny(tmp_path / "installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(folder)]))
    settings = [*SMALL, f"targets.method={NAME}", "targets.options.least=0.001"]
    launch = ("deepspeed", "--num_gpus", "2")
    succeed(place, *launch, "launch/generate.py", *settings, "cache.dir=runs/outside")

    inspect = ("python", "tools/inspect_cache.py", "--verify", "--json")
    found = json.loads(succeed(place, *inspect, "runs/outside"))
    assert (found["complete"], found["method"]) == (True, NAME)
    assert found["parameters"]["options"] == {"least": 0.001, "most": 8}

    cut = ("python", "tools/retruncate_cache.py", "runs/outside", "--out", "runs/smaller")
    succeed(place, *cut, "--option", "least=0.05")
    smaller = json.loads(succeed(place, *inspect, "runs/smaller"))
    assert 1 <= smaller["entries_per_position"] < found["entries_per_position"]

    train = [*SMALL_TRAINING, "train.out_dir=runs/trained", "loss.divergence=reverse_kl"]
    succeed(place, *launch, "launch/train.py", *SMALL, *train, "cache.dir=runs/smaller")
    lines = Path(place, "runs/trained/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert Path(place, "runs/trained/model/model.safetensors").exists()
