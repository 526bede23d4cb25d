"""Several online teachers: what their caches would give, at any layout."""

import json
import shutil

import numpy as np
import pytest

from megadistill.config import Config
from tests.models.made import teacher_and_text, tiny_llama, tiny_model
from tests.ranks import run_ranks

RUN, MESSAGE, BUILD = (
    "tests.train.runs:run",
    "tests.train.runs:message",
    "tests.cache.building:build",
)
VOCAB, STEPS = 512, 6
# The codec keeps multinomial's counts as they are. Of varopt's weights its rounding is 6e-5 of kd.
DRAWN = {"method": "multinomial", "draws": 20}


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """A folder with two teachers of one tokenizer, a student, and a text."""
    folder = teacher_and_text(tmp_path_factory.mktemp("trio"), documents=120)
    tiny_model(folder / "second", hidden_size=32, intermediate_size=64, seed=5)
    tiny_llama(folder / "student", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, seed=1)
    return folder


def settings(trio, out="out", **sections):
    keys = {
        "data": {
            "files": [str(trio / "text.jsonl")],
            "dir": str(trio / "tokens"),
            "seq_len": 24,
            "block_size": 8,
            "workers": 1,
        },
        "teacher": {
            "model": str(trio / "teacher"),
            "dtype": "float32",
            "mode": "online",
            "micro_batch": 3,
        },
        "cache": {"dir": str(trio / "cache"), "min_free": 0},
        "student": {"model": str(trio / "student")},
        "loss": {"ce_weight": 0.5},
        "train": {
            "out_dir": str(trio / out),
            "steps": STEPS,
            "global_batch": 8,
            "micro_batch": 2,
            "lr": 1e-3,
            "warmup_steps": 1,
        },
    }
    for section, values in sections.items():
        keys[section] = {**keys.get(section, {}), **values}
    return Config.model_validate(keys)


def second(trio, **changes):
    return {"ensemble": [{"model": str(trio / "second"), "weight": 3, **changes}]}


def train(config, ranks, tp=1):
    assert run_ranks(ranks, RUN, tp=tp, config=config) == [config.train.steps] * ranks
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        keys = ("loss", "kd_loss", "ce_loss", "grad_norm")
        return np.array([[r[key] for key in keys] for r in map(json.loads, file)])


@pytest.fixture(scope="module")
def drawn(trio):
    """The run beside two teachers that draw."""
    teacher = second(trio, micro_batch=5)
    config = settings(
        trio, "drawn", teacher=teacher, targets=DRAWN, train={"save_every": 1, "keep": 9}
    )
    return train(config, 2)


def test_it_is_the_run_from_the_caches_of_both(trio, drawn):
    for name in ("teacher", "second"):
        made = settings(
            trio,
            teacher={"model": str(trio / name), "mode": "cached"},
            targets=DRAWN,
            cache={"dir": str(trio / f"cache-{name}"), "min_free": 0},
        )
        run_ranks(2, BUILD, config=made)
    config = settings(
        trio,
        "cached",
        teacher={"mode": "cached"},
        targets=DRAWN,
        cache={
            "dir": str(trio / "cache-teacher"),
            "min_free": 0,
            "ensemble": [{"dir": str(trio / "cache-second"), "weight": 3}],
        },
    )
    found = train(config, 2)
    np.testing.assert_allclose(found, drawn, rtol=1e-5)


def test_exact_is_lists_of_every_id_at_every_layout(trio):
    teacher = second(trio, engine="zero3", offload="cpu")
    exact = train(settings(trio, "exact", teacher=teacher, targets={"method": "exact"}), 2)
    teacher = {"tp": 2, "offload": "cpu", **second(trio)}
    listed = train(
        settings(trio, "listed", teacher=teacher, targets={"method": "topk", "k": VOCAB}), 2, tp=2
    )
    np.testing.assert_allclose(exact, listed, rtol=1e-5)


def test_one_teacher_twice_is_that_teacher(trio):
    targets = {"method": "union", "k": 8}
    twice = {"ensemble": [{"model": str(trio / "teacher"), "weight": 2}]}
    loss = {"hidden_weight": 0.1}  # of the first teacher alone
    runs = [
        train(settings(trio, name, teacher=teacher, targets=targets, loss=loss), 1)
        for name, teacher in (("alone", {}), ("twice", twice))
    ]
    np.testing.assert_allclose(*runs, rtol=1e-6)
    card = (trio / "twice" / "model" / "README.md").read_text()
    teacher = "`teacher` (weight"
    assert f"- learned from: {teacher} 1) and {teacher} 2) (union), on the text of " in card


def test_resumed_it_goes_on_and_other_teachers_are_another_run(trio, drawn):
    config = settings(trio, "resumed", teacher=second(trio), targets=DRAWN)
    shutil.copytree(trio / "drawn", config.train.out_dir)
    shutil.rmtree(f"{config.train.out_dir}/model")
    for step in range(4, STEPS + 1):
        shutil.rmtree(f"{config.train.out_dir}/checkpoints/step-{step:06d}")
    np.testing.assert_allclose(train(config, 1), drawn, rtol=1e-5)
    for changes, said in (
        ({"weight": 2}, "teacher.ensemble.0.weight is 3.0, this run's is 2.0"),
        ({"dtype": "bfloat16"}, "teacher.ensemble.0.dtype is 'float32', this run's is 'bfl"),
        ({"model": str(trio / "teacher")}, "teacher.ensemble.0.model is "),
    ):
        teacher = second(trio, **changes)
        other = settings(trio, "resumed", teacher=teacher, targets=DRAWN)
        ((kind, text),) = run_ranks(1, MESSAGE, config=other)
        assert kind == "RecipeError"
        assert said in text
