"""The example for other trainers, run as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.cli.command_line import run
from tests.models.made import tiny_llama
from tests.programs import program
from tests.train.stores import VOCAB, make_store

TOOL = Path(__file__).resolve().parents[2] / "tools/train_with_transformers.py"


def train(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.parametrize("method", ["varopt", pytest.param("topk", marks=pytest.mark.long)])
def test_hugging_faces_trainer_learns_from_a_cache(tmp_path, method):
    cache = make_store(tmp_path / "cache", method=method)
    tiny_llama(tmp_path / "student", vocab_size=VOCAB, hidden_size=32, intermediate_size=48)
    done = train(
        "--cache",
        cache,
        "--student",
        tmp_path / "student",
        "--out",
        tmp_path / "out",
        "--steps",
        30,
        "--lr",
        0.01,
    )
    assert done.returncode == 0, done.stderr
    losses = [
        float(line.split("'loss': ")[1].split(",")[0].strip("'"))
        for line in done.stdout.splitlines()
        if "'loss': " in line
    ]
    assert len(losses) == 3
    assert losses[2] < 0.9 * losses[0]  # it learns 24 random sequences by heart
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize(
    ("cache", "student", "said"),
    [
        ("cache", "nothing", "nothing cannot be read"),
        ("cache", "small", "has 95 token ids"),
        ("none", "small", "none: no such folder, expected a cache or a token store"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(tmp_path, capsys, cache, student, said):
    make_store(tmp_path / "cache")
    tiny_llama(tmp_path / "small", vocab_size=VOCAB - 1)
    arguments = ["--cache", str(tmp_path / cache), "--student", str(tmp_path / student)]
    assert run(program("tools/train_with_transformers.py").main, arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said in line


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_training_starts_from_the_students_weights_unless_told_otherwise(tmp_path, init):
    make_store(tmp_path / "cache")
    folder = tiny_llama(tmp_path / "student", vocab_size=VOCAB, hidden_size=32, seed=7)
    arguments = ["--cache", tmp_path / "cache", "--student", folder, "--out", tmp_path / "out"]
    arguments += ["--steps", 1, "--lr", 1e-9, "--init", init]
    assert run(program("tools/train_with_transformers.py").main, list(map(str, arguments))) == 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).state_dict()
        for place in (folder, tmp_path / "out")
    )
    near = [torch.allclose(before[name], after[name], atol=1e-6) for name in before]
    assert all(near) == (init == "pretrained")
