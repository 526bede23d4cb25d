"""The benchmarks: figures that are what their names say, on small sizes, and clear refusals."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.bench.angle import Plan, Pupil, Teacher, angle, angles, renormalised
from megadistill.bench.fused_head import Sizes, head_cost
from megadistill.bench.log_probs import Synthetic, trained
from megadistill.bench.storage import storage
from megadistill.bench.variance import Variances
from megadistill.blocks import open_store
from megadistill.config import Config
from megadistill.data.tokens import build_tokens
from megadistill.errors import StoreError
from megadistill.teacher.select import select_targets
from tests.models.made import teacher_and_text, tiny_llama
from tests.ranks import run_ranks
from tests.teacher.test_variance import multinomial_variance, varopt_variance

TOOL = Path(__file__).resolve().parents[2] / "tools/bench.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A teacher in `teacher`, and the token store of a text in `tokens`."""
    folder = teacher_and_text(tmp_path_factory.mktemp("bench"), documents=300)
    build_tokens(config(folder), progress=False)
    return folder


def config(folder: Path) -> Config:
    return Config.model_validate(
        {
            "data": {
                "files": [str(folder / "text.jsonl")],
                "dir": str(folder / "tokens"),
                "seq_len": 32,
                "block_size": 8,
            },
            "teacher": {"model": str(folder / "teacher")},
            "cache": {"dir": str(folder / "cache"), "min_free": 0},
            "targets": {"tau": 0.1},
        }
    )


def test_a_synthetic_distribution_is_the_same_each_time_and_sums_to_one():
    distribution = Synthetic(500, 200, seed=3)
    first, second = torch.cat(list(distribution)), torch.cat(list(distribution))
    assert torch.equal(first, second)
    assert first.shape == (200, 500)
    torch.testing.assert_close(first.exp().sum(1), torch.ones(200))
    share = first.exp().sum(0)
    assert share[:20].sum() > 2 * share[100:120].sum()


def test_a_trained_teacher_is_sharpened_to_the_entropy_that_was_asked_for(corpus):
    distribution = trained(
        str(corpus / "teacher"), str(corpus / "tokens"), positions=256, entropy=1.9
    )
    log_probs = torch.cat(list(distribution))
    assert len(log_probs) == distribution.positions == 256
    assert -(log_probs.exp() * log_probs).sum(1).mean() == pytest.approx(1.9, abs=1e-3)


def test_a_trained_teacher_is_left_as_it_is_at_an_entropy_of_0(corpus):
    distribution = trained(
        str(corpus / "teacher"), str(corpus / "tokens"), positions=64, entropy=0.0
    )
    teacher = AutoModelForCausalLM.from_pretrained(corpus / "teacher", dtype=torch.float32)
    sequences = [open_store(corpus / "tokens")[i]["tokens"] for i in range(2)]
    with torch.inference_mode():
        logits_NV = teacher(torch.tensor(np.stack(sequences).astype(int))).logits.flatten(0, 1)
    torch.testing.assert_close(
        torch.cat(list(distribution)), logits_NV.log_softmax(-1), rtol=1e-4, atol=1e-5
    )
    assert distribution.name.endswith("teacher as it is")


def test_more_positions_than_the_token_store_has_are_refused(corpus):
    with pytest.raises(StoreError, match=r"tokens: holds \d+ positions, expected at least 1000000"):
        trained(str(corpus / "teacher"), str(corpus / "tokens"), positions=10**6, entropy=1.9)


def test_variances_and_entries_are_those_worked_out_position_by_position():
    distribution = Synthetic(300, 40)
    p_NV = torch.cat(list(distribution)).double().exp().numpy()
    variances = Variances(distribution)
    for tau in (0.03, 0.06, 0.2):
        variance, entries = varopt_variance(p_NV, tau)
        assert variances.varopt(tau, rounded=False) == pytest.approx(variance.mean(), rel=1e-6)
        assert variances.varopt(tau) > variances.varopt(tau, rounded=False)
        assert variances.entries(tau) == pytest.approx(entries.mean())
    assert variances.multinomial(50) == pytest.approx(multinomial_variance(p_NV, 50)[0].mean())
    tau = variances.tau_of_entries(5.0)
    assert variances.entries(tau * 1.01) <= 5 <= variances.entries(tau * 0.99)


def test_storage_weighs_every_format_on_the_same_distribution():
    distribution = Synthetic(1000, 512)
    varopt, listed = storage(distribution, seq_len=256)
    assert varopt["variance"] == pytest.approx(varopt["variance_of_draws"], rel=1e-2)
    assert varopt["variance"] == pytest.approx(Variances(distribution).varopt(varopt["tau"]))
    for row in (varopt, listed):
        assert 0.98 * row["entropy_of_streams"] < row["bytes"] < 1.15 * row["entropy_of_streams"]
    assert varopt["ratio"] == varopt["bytes"] / varopt["random_sampling"]
    # 50 draws from such distributions hit 3 to 25 different ids.
    assert 9 < varopt["random_sampling"] < 75
    assert listed["packed"] == 64 * (math.ceil(math.log2(1000)) + 16) / 8
    assert 0 < listed["kl"] < 1e-4
    assert 0 < listed["log_prob_error"] < math.log(2) / 16


def test_writer_times_runs_that_really_write_and_leaves_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    row, committed = run_ranks(1, "tests.bench.test_bench:timed", config=config(corpus))[0]
    assert row["pairs"] == 2
    assert row["positions"] == 2 * 8 * 32
    assert row["least"] <= row["ratio"] <= row["most"]
    assert committed == [2, 2, 0, 0, 2]  # to warm up, then on, off, off, on
    assert not (corpus / "cache").exists()
    assert list(tmp_path.iterdir()) == []


def timed(mesh, config: Config):
    """The row, and how many blocks each run had committed."""
    import shutil

    from megadistill.bench import writing_cost

    committed: list[int] = []

    class Shutil:
        @staticmethod
        def rmtree(path, ignore_errors=False):
            if (Path(path) / "cache.json").exists():
                committed.append(len(open_store(path).committed()))
            shutil.rmtree(path, ignore_errors=ignore_errors)

    writing_cost.shutil, before = Shutil, writing_cost.shutil
    try:
        return writing_cost.writer_cost(config, mesh, pairs=2, blocks=2), committed
    finally:
        writing_cost.shutil = before


def test_the_heads_memory_is_what_the_logits_take_and_its_ratios_are_those_of_its_rounds():
    sizes = Sizes(positions=512, hidden=16, vocab=30_000)
    few, many = head_cost(sizes, [2, 30], rounds=3)
    for row, entries in ((few, 2), (many, 30)):
        assert (row["entries"], row["rounds"]) == (entries, 3)
        assert row["least"] <= row["ratio"] <= row["most"]
        assert row["cpu_least"] <= row["cpu_ratio"] <= row["cpu_most"]
        # Plain holds [N, V] at least twice at once; fused holds a quarter of it.
        logits_mib = 4 * 512 * 30_000 / 2**20
        assert row["plain_mib"] > 1.9 * logits_mib
        assert logits_mib / 4 < 1.1 * row["fused_mib"] < logits_mib
        assert row["memory_ratio"] == pytest.approx(row["fused_mib"] / row["plain_mib"])


def test_angles_are_those_of_targets_that_went_through_the_codec(corpus):
    plan = Plan(batches=3, batch=4, steps=2, target_bytes=9.0, draws=20, entropy=1.5)
    teacher = Teacher(str(corpus / "teacher"), str(corpus / "tokens"), plan)
    rows = list(angles(teacher, Pupil(str(corpus / "teacher"))))
    assert [row["data"] for row in rows[::6]] == ["start", "middle", "end"]
    first = {row["method"]: row for row in rows[:6]}
    assert list(first) == [
        "varopt",
        "20 draws",
        "top-12",
        "top-12 with tail",
        "top-50",
        "top-50 with tail",
    ]
    assert first["varopt"]["entropy"] == pytest.approx(1.5, abs=1e-3)
    assert first["varopt"]["bytes"] == pytest.approx(9.0, rel=0.05)
    assert first["top-50"]["entries"] == 50
    for row in rows:
        assert 0 < row["least"] <= row["degrees"] <= row["most"] < 90
    # The longer list and the tail bring the gradient nearer; what training does is learning.
    assert first["top-50"]["degrees"] < first["top-12"]["degrees"]
    assert first["top-12 with tail"]["degrees"] < first["top-12"]["degrees"]
    assert rows[-1]["kl"] < rows[0]["kl"]


def test_a_student_equals_full_distillation_where_the_list_is_the_vocabulary(corpus):
    plan = Plan(batches=1, batch=2, entropy=None)
    teacher = Teacher(str(corpus / "teacher"), str(corpus / "tokens"), plan)
    assert teacher.temperature == 1
    pupil, ids = Pupil(str(corpus / "teacher"), seed=3), teacher.measured(0)
    log_probs, hidden = teacher.log_probs(ids), pupil.hidden(ids)
    whole = pupil.gradient(pupil.full(hidden, log_probs))
    keys = torch.stack([torch.zeros(len(hidden), dtype=torch.long), torch.arange(len(hidden))], 1)
    listed = select_targets(log_probs, method="topk", k=teacher.vocab_size, keys_N=keys)
    for targets in (listed, renormalised(listed)):
        assert angle(whole, pupil.gradient(pupil.sparse(hidden, targets))) < 0.05


def test_a_token_store_too_short_for_the_angle_is_refused(corpus):
    run = bench(corpus, "angle", "--teacher", "teacher", "--tokens", "tokens", "--batches", "500")
    assert run.returncode == 2
    assert "expected at least 8016: set --batches lower" in run.stderr


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, TOOL, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_the_tool_measures_a_teacher_and_synthetic_distributions(corpus):
    run = bench(
        corpus,
        "storage",
        "--teacher",
        "teacher",
        "--tokens",
        "tokens",
        "--vocab_size",
        "500",
        "--positions",
        "256",
        "--seq_len",
        "128",
        "--json",
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(row["data"], row["method"]) for row in rows] == [
        (name, method)
        for name in ("teacher at 1.9 nats", "synthetic, 500 ids")
        for method in ("varopt", "topk")
    ]


def test_the_tool_says_what_it_leaves_out_and_reads_well(tmp_path):
    run = bench(tmp_path, "storage", "--vocab_size", "300", "--positions", "128")
    assert run.returncode == 0, run.stderr
    assert "runs/demo/teacher: not there, left out: `make demo` makes it" in run.stderr
    assert run.stdout.startswith("synthetic, 300 ids, varopt:\n")


def test_the_codec_is_timed_for_every_method(tmp_path):
    run = bench(
        tmp_path, "codec", "--vocab_size", "300", "--seq_len", "64", "--seconds", "0.05", "--json"
    )
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert [row["method"] for row in rows] == ["varopt", "multinomial", "topk", "topp"]
    for row in rows:
        assert row["h200s_fed"] == row["decoded_a_second"] / 65_000
        assert row["encoded_a_second"] > 0


def test_the_writer_is_timed_in_pairs(corpus):
    run = bench(
        corpus,
        "writer",
        "--teacher",
        "teacher",
        "--tokens",
        "tokens",
        "--pairs",
        "1",
        "--blocks",
        "2",
        "--json",
    )
    (row,) = map(json.loads, run.stdout.splitlines())
    assert row["ratio"] == row["seconds_on"] / row["seconds_off"]


def test_more_blocks_than_the_token_store_has_are_refused(corpus):
    run = bench(corpus, "writer", "--teacher", "teacher", "--tokens", "tokens", "--blocks", "5000")
    assert run.returncode == 2
    assert "expected at least 5000: set --blocks lower" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["storage", "--vocab_size", "0"], "0: expected a number of at least 1"),
        (["storage", "--positions", "-3"], "-3: expected a number of at least 1"),
        (["storage", "--entropy", "no"], "no: expected a number, 0 or more"),
        (["writer"], "runs/demo/tokens"),
        (["compression"], "invalid choice: 'compression'"),
    ],
)
def test_bad_arguments_are_refused_in_a_line(tmp_path, arguments, said):
    run = bench(tmp_path, *arguments)
    assert run.returncode == 2
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_step_times_whole_steps_of_both_sides_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    rows = run_ranks(2, "tests.bench.test_bench:stepped", folder=str(tmp_path))
    for row, losses in rows:
        assert row["pairs"] == 2
        assert row["least"] <= row["ratio"] <= row["most"]
        # A pair to warm up, then two; sides change places. Labels alone have no distillation term.
        kinds = ["cache" if kd else "labels" for kd in losses]
        assert kinds == ["cache", "labels", "labels", "cache", "cache", "labels"]
    assert not list(tmp_path.glob("megadistill-*"))


def stepped(mesh, folder: str):
    """The row, and of each micro-batch's loss whether it has a distillation term."""
    import tempfile

    from megadistill.bench import step
    from megadistill.train.student_engine import Trainer

    seen, backward = [], Trainer.backward

    def watched(self, *args, **kwargs):
        terms = backward(self, *args, **kwargs)
        seen.append(terms.kd_count > 0)
        return terms

    Trainer.backward, tempfile.tempdir = watched, folder  # the rank is older than TMPDIR
    try:
        sizes = step.StepSizes(
            vocab=300, hidden=32, layers=1, seq_len=32, global_batch=4, micro_batch=2
        )
        return step.step_cost(sizes, mesh, pairs=2), seen
    finally:
        Trainer.backward, tempfile.tempdir = backward, None


def online_rows(mesh, config):
    from megadistill.bench.online_step import online_cost

    return list(online_cost(config, mesh, rounds=2))


def test_a_step_with_the_teacher_beside_it_is_timed_against_one_from_the_cache(corpus, tmp_path):
    tiny_llama(tmp_path / "student", vocab_size=512, hidden_size=32, intermediate_size=48)
    asked = config(corpus).model_dump(mode="json")
    asked["teacher"]["dtype"] = "float32"
    asked["cache"]["dir"] = str(tmp_path / "cache")
    asked["student"], asked["order"] = {"model": str(tmp_path / "student")}, {}
    asked["train"] |= {
        "out_dir": str(tmp_path / "out"),
        "steps": 9,
        "global_batch": 4,
        "micro_batch": 2,
    }
    asked = Config.model_validate(asked)
    run_ranks(2, "tests.cache.test_build:build", config=asked)
    rows, others = run_ranks(2, "tests.bench.test_bench:online_rows", config=asked)
    assert (
        [row["method"] for row in rows]
        == ["varopt", "topk", "union", "exact"]
        == [row["method"] for row in others]
    )
    for row in rows:
        assert row["least"] <= row["ratio"] <= row["most"]
        assert 0 < row["teacher"] < 1
    assert not (tmp_path / "out").exists()


def test_the_losses_on_given_logits_that_are_timed_have_the_same_gradient():
    from megadistill.bench.subset import listed, union, whole

    generator = torch.Generator().manual_seed(0)
    student_CV, noise_CV = torch.randn(2, 9, 3000, generator=generator)
    teacher_CV = student_CV + noise_CV
    ours_CV = union(student_CV.clone(), teacher_CV.clone(), 20)
    torch.testing.assert_close(ours_CV, listed(student_CV, teacher_CV, 20), rtol=1e-3, atol=1e-6)
    every_CV = union(student_CV.clone(), teacher_CV.clone(), 3000)
    torch.testing.assert_close(every_CV, whole(student_CV, teacher_CV), rtol=1e-3, atol=1e-6)


def test_the_subset_bench_prints_a_row_for_each_number_of_entries():
    found = subprocess.run(
        [
            sys.executable,
            str(TOOL),
            "subset",
            "--pairs",
            "2",
            "--positions",
            "4",
            "--vocab_size",
            "500",
            "--entries",
            "3",
            "5",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["data"].split(", ")[-1] for row in rows] == [
        "3 ids of each side",
        "5 ids of each side",
    ]
    for name in ("whole", "listed", "step"):
        for row in rows:
            assert row[f"{name}_least"] <= row[f"{name}_ratio"] <= row[f"{name}_most"]


def test_the_projector_bench_prints_a_row_for_each_vocabulary_of_the_student():
    found = subprocess.run(
        [
            sys.executable,
            str(TOOL),
            "projector",
            "--pairs",
            "2",
            "--positions",
            "4",
            "--vocab_size",
            "500",
            "--hidden",
            "16",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["data"].split(", ")[-1] for row in rows] == ["student 100 x 8", "student 500 x 8"]
    for name in ("map", "scored", "whole"):
        for row in rows:
            assert row[f"{name}_least"] <= row[f"{name}_ratio"] <= row[f"{name}_most"]


def test_the_naive_way_of_the_projector_bench_is_over_the_embeddings():
    from megadistill.bench.projector import Problem, ProjectorSizes

    problem = Problem(ProjectorSizes(5, 60, 8, 20, 4))
    averaged_NH = problem.over_embeddings(problem.probs_NV)
    expected_NH = torch.einsum("nv,vh->nh", problem.probs_NV, problem.embeddings_VH)
    torch.testing.assert_close(averaged_NH, expected_NH)
    for way in problem.ways.values():
        way()
    assert problem.projector.weight.grad.abs().sum() > 0
    problem.forget()
    assert problem.projector.weight.grad is None


@pytest.mark.skipif(version("transformers").startswith("4."), reason="sizes are of version 5")
def test_the_bench_of_documents_apart_prints_a_row_for_each_model():
    found = subprocess.run(
        [
            sys.executable,
            str(TOOL),
            "apart",
            "--pairs",
            "2",
            "--seq_len",
            "64",
            "--hidden",
            "64",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    names = [row["data"].split(",")[0] for row in rows]
    assert names == ["falcon_h1", "lfm2", "qwen3_next"]
    for row in rows:
        assert row["forwards"] >= 1 <= row["tokens"]
        assert row["least"] <= row["ratio"] <= row["most"]
