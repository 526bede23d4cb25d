"""Benchmarks of ways to compute one thing: they agree, and each has a row."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from tests.bench.small import TOOL


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
