"""The plan: what is known, what is estimated, and what cannot be known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megadistill.blocks import BlockStore
from megadistill.config import load_config
from megadistill.model_files import find_model
from megadistill.plan import make_plan, show_plan
from tests.models import tiny_llama


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tiny_llama("teacher")
    return tmp_path


def plan(*overrides: str, world: int = 2):
    settings = ["data.max_samples=null", "data.block_size=256", "train.steps=250", *overrides]
    return make_plan(load_config("demo.yaml", settings), world=world)


def line(made, name: str) -> str:
    return dict(made.lines)[name]


def test_the_parameters_of_a_model_are_counted_in_its_weights_or_worked_out(place):
    import torch
    from safetensors.torch import load_file

    expected = sum(t.numel() for t in load_file("teacher/model.safetensors").values())
    model = find_model("./teacher", key="teacher.model")
    assert model.parameters() == (expected, True)
    Path("teacher/model.safetensors").unlink()
    assert model.parameters() == (expected, False)
    assert torch.get_default_dtype() == torch.float32


def test_the_demos_sequences_are_estimated_within_a_third(place):
    made = plan("teacher.model=./teacher")
    # 3.25 million tokens of 128, measured with a vocabulary of 4,096
    assert made.sequences == pytest.approx(3.25e6 / 128, rel=0.33)
    assert made.blocks == -(-made.sequences // 256)
    assert "estimated from" in line(made, "sequences")
    assert made.steps == 250
    assert "512,000 tokens" in line(made, "steps")
    assert "counted" in line(made, "teacher")
    assert "are not on this machine" in line(made, "student")


def test_a_planned_store_is_known_not_estimated(place):
    store = BlockStore.create(
        "tokens", kind="tokens", header={"recipe": {}}, block_size=4,
        columns={"tokens": "ndarray:uint32:8", "documents": "ndarray:uint32"},
    )  # fmt: skip
    store.plan(10)
    store.commit(
        0,
        [{"tokens": np.zeros(8, np.uint32), "documents": np.zeros(1, np.uint32)}] * 4,
        statistics={},
    )
    made = plan("data.dir=tokens", "data.block_size=4", "data.seq_len=8")
    assert (made.sequences, made.blocks) == (10, 3)
    assert line(made, "sequences") == "10 of 8 tokens, known: tokens is planned"
    assert "are there, in tokens" in line(made, "token store")
    there = sum(p.stat().st_size for p in Path("tokens").iterdir() if p.is_file())
    assert made.token_bytes_to_come == 2 * there  # one block of three is there


def test_what_cannot_be_known_is_said_to_be_unknown(place):
    settings = ["data.source=null", "data.name=a/b", "train.steps=null", "train.epochs=1"]
    made = plan(*settings, "train.warmup_steps=0")
    assert (made.sequences, made.cache_bytes, made.steps) == (None, None, None)
    assert "unknown: the number of documents is not known" in line(made, "sequences")
    assert "size unknown" in line(made, "cache")
    assert "unknown" in line(made, "steps")
    made = plan(*settings, "data.max_samples=1280")
    assert made.sequences == 10_000
    assert "estimated from at most 1,280 documents, 1000 tokens each" in line(made, "sequences")
    assert made.steps == 625
    made = plan("data.source=null", "data.files=[none.txt]")
    assert "unknown: data.files: no file matches" in line(made, "sequences")


def test_local_files_are_estimated_by_their_size(place):
    Path("a.txt").write_text("x" * 4_200_000)
    made = plan("data.source=null", "data.files=[a.txt]")
    assert made.sequences == pytest.approx(1e6 / 128, rel=0.01)
    assert plan("data.source=null", "data.files=[a.txt]", "data.max_samples=128").sequences == 1000


def test_smaller_tau_and_larger_k_need_a_larger_cache(place):
    sizes = [
        plan(*settings).cache_bytes
        for settings in (
            ["targets.tau=0.2"], ["targets.tau=0.06"], ["targets.tau=0.02"],
            ["targets.method=topk", "targets.k=128"],
        )
    ]  # fmt: skip
    assert sizes == sorted(sizes)


def test_memory_falls_with_the_ranks_that_share_a_model(place):
    student = ["student.model=./teacher", "cache.dir=c"]
    made = {world: plan(*student, "teacher.model=./teacher", world=world) for world in (1, 8)}
    assert made[8].student_memory < made[1].student_memory
    assert made[8].teacher_memory == made[1].teacher_memory
    assert made[1].run_bytes_to_come > 0


def test_dry_run_prints_a_configuration_that_loads_and_the_plan_as_comments(place, capsys):
    config = load_config("demo.yaml", ["teacher.model=./teacher", "train.lr=3e-5"])
    show_plan(config)
    printed = capsys.readouterr().out
    Path("again.yaml").write_text(printed)
    assert load_config("again.yaml") == config
    assert "# The plan, on 1 rank(s):\n#   sequences " in printed
    assert all(line.startswith("#") for line in printed.partition("# The plan")[2].splitlines()[1:])


def test_other_ranks_print_no_plan(place, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    show_plan(load_config("demo.yaml"))
    assert capsys.readouterr().out == ""
