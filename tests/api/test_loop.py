"""The loop of one's own trains as a plain torch loop does, and type-checks strictly."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import megadistill
from tests.api.loop import train
from tests.models.made import tiny_llama
from tests.train.stores import VOCAB, make_store

ROOT = Path(__file__).resolve().parents[2]


def plain_losses(cache_dir: str, student_dir: str, *, steps: int) -> list[float]:
    """The same training with logits [N, V] and targets as a dense matrix, in float64.

    Each document runs alone, so that nothing depends on how packed documents are kept apart.
    """
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float64)
    cache = megadistill.open_cache(cache_dir)
    order = megadistill.CacheSampler(cache, global_batch=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        kd_sum, ce_sum, kd_count, ce_count = torch.zeros(()), torch.zeros(()), 0, 0
        for i in order.step_rows(step):
            sample = cache[i]
            tokens = torch.from_numpy(sample["tokens"].astype(np.int64))
            bounds = [*sample["documents"].tolist(), len(tokens)]
            for start, stop in pairwise(bounds):
                log_q = model(tokens[None, start:stop]).logits[0].log_softmax(-1)
                for t in range(start, stop - 1):  # the last has no next token
                    ce_sum = ce_sum - log_q[t - start, tokens[t + 1]]
                    ce_count += 1
                    a, b = sample["targets"].offsets[t : t + 2]
                    if a < b:
                        p = torch.zeros(VOCAB, dtype=torch.float64)
                        weights = sample["targets"].weights[a:b].astype(np.float64)
                        p[sample["targets"].ids[a:b]] = torch.from_numpy(weights)
                        kd_sum = kd_sum - (p * log_q[t - start]).sum()
                        kd_count += 1
        loss = kd_sum / kd_count + 0.5 * ce_sum / ce_count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def cache_and_student(tmp_path: Path) -> tuple[str, str]:
    student = tiny_llama(tmp_path / "student", vocab_size=VOCAB, hidden_size=32)
    return make_store(tmp_path / "cache", seed=1), student


def test_losses_are_those_of_a_plain_torch_loop_in_float64(
    cache_and_student: tuple[str, str],
) -> None:
    expected = plain_losses(*cache_and_student, steps=5)
    np.testing.assert_allclose(train(*cache_and_student, steps=5), expected, rtol=2e-5)
    assert expected[-1] < 0.95 * expected[0]


def test_workers_that_read_ahead_change_nothing(cache_and_student: tuple[str, str]) -> None:
    alone = train(*cache_and_student, steps=4)
    assert train(*cache_and_student, steps=4, workers=2) == alone


# torch and transformers are megabytes of source that the loop says nothing about.
MYPY = """[mypy]
[mypy-transformers.*,torch._inductor.*,torch._dynamo.*]
follow_imports = skip
"""
MISTAKES = """import megadistill

cache = megadistill.open_cache("cache")
student = megadistill.wrap_student(None, cache)
batch = megadistill.collate([cache[0]])
student.forward(batch, ce_wieght=1.0)
student.forward(batch).los
megadistill.select_targets(batch.tokens_BT, method="topk", kk=3)
megadistill.encode_targets(batch.targets, vocab_size=9, codec=None)
megadistill.opn_cache("cache")
"""


def test_the_loop_passes_mypy_strict_and_mistakes_do_not(tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", tmp_path / "mypy.ini"]
    command += ["--cache-dir", tmp_path / "cache", "tests/api/loop.py", tmp_path / "mistakes.py"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [line for line in checked.stdout.splitlines() if ": error: " in line]
    assert [line.split(":")[0].endswith("mistakes.py") for line in found] == [True] * 5, found
    for line, name in zip(found, ("ce_wieght", "los", "kk", "codec", "opn_cache"), strict=True):
        assert f'"{name}"' in line
