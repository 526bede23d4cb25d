"""The KL that a step shows: of the teacher's distribution, and not a cross-entropy beside it."""

import json
import math

import numpy as np
import pytest
import torch

from megadistill.config import LossConfig
from megadistill.student.head import distillation_terms
from megadistill.student.loss.terms import kl_of_step
from megadistill.targets.ensemble import Ensemble
from megadistill.teacher.select import select_targets
from megadistill.train.reporting.metrics import step_line
from tests.ranks import run_ranks
from tests.student.loss.reference import random_targets
from tests.train.stores import make_config, make_store

RUN = "tests.train.runs:run"
N, H, V = 4000, 8, 50
LINE = {
    "step": 3,
    "loss": 2.5,
    "kd_loss": 2.0,
    "ce_loss": 3.0,
    "lr": 1e-3,
    "grad_norm": 1.0,
    "tokens_per_s": 1e3,
    "data_s": 0.0,
    "step_s": 1.0,
    "memory_used": 2**30,
    "memory_total": 2**31,
}


@pytest.mark.parametrize(
    ("method", "settings"), [("varopt", {"tau": 0.1}), ("multinomial", {"draws": 8})]
)
def test_from_sampled_targets_it_is_the_kl_of_whole_distributions_up_to_its_noise(method, settings):
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(N, H, generator=generator)
    weight_VH = torch.randn(V, H, generator=generator)
    q = (hidden_NH @ weight_VH.T).log_softmax(1)
    p = (q + torch.randn(N, V, generator=generator)).log_softmax(1)
    exact_N = (p.exp() * (p - q)).sum(1)
    labels_N = torch.zeros(N, dtype=torch.int64)
    keys_N = torch.stack([torch.arange(N), torch.zeros(N, dtype=torch.int64)], 1)
    targets = select_targets(
        p, method=method, seed=1, keys_N=keys_N, labels_N=labels_N, **settings
    ).torch()
    terms = distillation_terms(hidden_NH, weight_VH, targets, labels_N)
    entropy = targets.entropy_sum(torch.ones(N, dtype=torch.bool))
    found = kl_of_step(LossConfig(), {"kd": float(terms.kd_sum)}, entropy, N)["kl"]
    assert found == pytest.approx(float(exact_N.mean()), abs=0.05)
    assert float(terms.kd_sum) / N > 1.5 * found


def test_it_is_left_out_where_it_is_not_known():
    valid_N = np.ones(3, bool)
    listed = random_targets([2, 3, 1], 20, method="topk").numpy()
    sampled = random_targets([2, 3, 1], 20).numpy()
    assert listed.entropy_sum(valid_N) == 0  # compared by buckets, it is a KL already
    assert math.isnan(sampled.entropy_sum(valid_N))
    assert math.isnan(Ensemble.of([listed, sampled], [1.0, 1.0]).entropy_sum(valid_N))
    totals = {"kd": 6.0}
    assert kl_of_step(LossConfig(), totals, math.nan, 3) == {}
    assert kl_of_step(LossConfig(), totals, 0.0, 0) == {}
    assert kl_of_step(LossConfig(divergence="jsd"), totals, 0.0, 3) == {}
    assert kl_of_step(LossConfig(temperature=2.0), totals, 3.0, 3) == {"kl": 1.0}


def test_the_step_line_shows_it_in_place_of_the_distillation_loss():
    assert "loss 2.5000  kl 0.2500  ce 3.0000  lr" in step_line({**LINE, "kl": 0.25}, 9)
    assert "loss 2.5000  kd 2.0000  ce 3.0000  lr" in step_line(LINE, 9)
    assert "loss 2.5000  ce 3.0000  lr" in step_line({**LINE, "kd_loss": None}, 9)
    assert "ce 3.0000  router 1.5000  lr" in step_line({**LINE, "router_loss": 1.5}, 9)


def test_a_run_from_listed_targets_has_it_in_its_metrics(tmp_path):
    make_store(tmp_path / "cache", seed=1, method="topk")
    config = make_config(tmp_path, loss={"temperature": 2.0}, train={"steps": 2})
    assert run_ranks(2, RUN, config=config) == [2, 2]
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        line = json.loads(file.readline())
    assert line["kl"] == pytest.approx(line["kd_loss"] / 4)
