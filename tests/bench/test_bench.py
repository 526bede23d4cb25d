"""The benchmarks: figures that are what their names say, on small sizes, and clear refusals."""

from __future__ import annotations

import json
import math
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
from megadistill.errors import StoreError
from megadistill.teacher.select import select_targets
from tests.bench.small import bench, config
from tests.ranks import run_ranks
from tests.teacher.test_variance import multinomial_variance, varopt_variance


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
