"""Parameters of divergences: the key's value reaches the loss, against a plain torch loop."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.train.plain import plain_steps
from tests.train.stores import make_config, make_store


@pytest.mark.parametrize(
    "loss",
    [
        {"divergence": "skewed_kl", "alpha": 0.4},
        {"divergence": "skewed_reverse_kl", "alpha": 0.7},
        {"divergence": "adaptive_kl", "head_mass": 0.9},
    ],
    ids=lambda loss: " ".join(map(str, loss.values())),
)
def test_a_divergence_has_the_parameter_of_the_configuration(tmp_path, loss):
    make_store(tmp_path / "cache", seed=1, method="topk")
    config = make_config(tmp_path, loss=loss, train={"steps": 2})
    run_ranks(1, "tests.train.runs:run", config=config)
    lines = Path(config.train.out_dir, "metrics.jsonl").read_text().splitlines()
    found = [[record["loss"], record["grad_norm"]] for record in map(json.loads, lines)]
    expected, _ = plain_steps(config)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    (name,) = set(loss) - {"divergence"}
    default = type(config.loss).model_fields[name].default
    usual = make_config(tmp_path, loss=loss | {name: default}, train={"steps": 2})
    assert abs(plain_steps(usual)[0][0][0] - expected[0][0]) > 1e-4
