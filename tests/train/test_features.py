"""Hidden states and attention of the online teacher, aligned."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megadistill.config import Config
from megadistill.train.reporting.metrics import step_line
from tests.models.made import teacher_and_text, tiny_llama
from tests.ranks import run_ranks
from tests.train.online.test_online_teacher import RUN, series, settings, stand_at, train

STEPS, PAIRS = 6, [(1, 2), (-1, -1)]
# By default parameters of up to 100,000 elements, all of these, are left whole.
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
COLUMNS = ("loss", "kd_loss", "ce_loss", "hidden_loss", "attention_loss", "grad_norm")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with a teacher of two layers and a student of three, narrower, of fewer heads."""
    folder = teacher_and_text(tmp_path_factory.mktemp("pair"), documents=120)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    tiny_llama(folder / "student", intermediate_size=48, num_key_value_heads=1, seed=1, **sizes)
    return folder


def aligning(pair, out, **sections):
    """Training that learns from the teacher's layers and from its distributions."""
    keys = {
        "teacher": {"attention": "eager"},
        "student": {"model": str(pair / "student"), "attention": "eager"},
        "loss": {"ce_weight": 0.5, "hidden_weight": 0.3, "attention_weight": 0.2},
        "features": {"hidden_layers": PAIRS},
        "train": {"steps": STEPS, "save_every": 1, "keep": 99},
    }
    for section, values in sections.items():
        keys[section] = {**keys.get(section, {}), **values}
    return settings(pair, out, **keys)


@pytest.fixture(scope="module")
def aligned(pair):
    return train(aligning(pair, "aligned"), 2)


def relative_error(ours_MS, theirs_MH):
    return ((ours_MS - theirs_MH).square().sum(1) / theirs_MH.square().sum(1)).mean()


def layers_of(model, inputs):
    """(hidden states by layer, from 1; attention by layer; logits) as transformers gives them."""
    given = model(**inputs, output_hidden_states=True, output_attentions=True)
    # Its last state has gone through the norm behind the last layer: the layer's own is wanted.
    last = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda module, inputs, output: last.append(output)
    )
    model(**inputs)
    hook.remove()
    return [*given.hidden_states[1:-1], last[0]], given.attentions, given.logits


def test_it_is_what_a_plain_torch_loop_does(pair, aligned):
    from transformers import AutoModelForCausalLM

    from megadistill.blocks import open_store
    from megadistill.models.attention import forward_inputs
    from megadistill.student.features import FeatureAlignment, FeaturePlan
    from tests.train.plain import batch_of, clip_and_step, optimizer_and_order

    config = aligning(pair, "aligned")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(
            pair / name, dtype=torch.float32, attn_implementation="eager"
        )
        for name in ("teacher", "student")
    )
    plan = FeaturePlan(((1, 2), (2, 3)), ((2, 3),), "mse", 64, 32, learned=True)
    begun = FeatureAlignment(plan).initial(config.train.seed)
    matrices = torch.nn.ParameterList(
        [begun["projections.0.weight"], begun["projections.1.weight"]]
    )
    store, both = open_store(pair / "tokens"), torch.nn.ModuleList([student, matrices])
    optimizer, order = optimizer_and_order(config, both, store)
    for step in range(STEPS):
        tokens_BT, documents, labels_N = batch_of(store, order, step)
        inputs = forward_inputs(student, tokens_BT, documents)
        valid = labels_N != -100
        with torch.no_grad():
            theirs, their_attention, logits = layers_of(teacher, inputs)
        ours, our_attention, our_logits = layers_of(student, inputs)
        p, q = (z.flatten(0, 1)[valid].log_softmax(1) for z in (logits, our_logits))
        kd, ce = (p.exp() * (p - q)).sum(1).mean(), -q.gather(1, labels_N[valid][:, None]).mean()
        hidden = sum(
            relative_error(ours[s].flatten(0, 1)[valid] @ matrix.T, theirs[t].flatten(0, 1)[valid])
            / 2
            for matrix, (t, s) in zip(matrices, [(0, 1), (1, 2)], strict=True)
        )
        a, b = (each[-1].mean(1).flatten(0, 1)[valid] for each in (their_attention, our_attention))
        attention = (
            torch.nn.functional.kl_div(b.clamp_min(1e-30).log(), a, reduction="none").sum(1).mean()
        )
        loss = kd + 0.5 * ce + 0.3 * hidden + 0.2 * attention
        norm = clip_and_step(optimizer, both, loss, step, config.train)
        expected = [x.item() for x in (loss, kd, ce, hidden, attention, norm)]
        np.testing.assert_allclose([aligned[step][c] for c in COLUMNS], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("ranks", "tp", "engine"),
    [(1, 1, "tensor_parallel"), (2, 2, "tensor_parallel"), (2, 1, "zero3")],
)
def test_every_layout_of_the_teacher_aligns_alike(pair, aligned, ranks, tp, engine):
    config = aligning(
        pair,
        f"{engine}{ranks}{tp}",
        teacher={"attention": "eager", "tp": tp, "engine": engine},
        train={"steps": STEPS, "activation_checkpointing": ranks == 1},
        deepspeed=PARTITIONED,
    )
    found = train(config, ranks, tp)
    np.testing.assert_allclose(series(found, *COLUMNS), series(aligned, *COLUMNS), rtol=1e-5)


def test_in_bfloat16_it_is_about_the_same(pair, aligned):
    config = aligning(
        pair,
        "bf16",
        teacher={"attention": "eager", "dtype": "bfloat16"},
        deepspeed={"bf16": {"enabled": True}, **PARTITIONED},
    )
    found = train(config, 2)
    np.testing.assert_allclose(series(found, *COLUMNS), series(aligned, *COLUMNS), rtol=0.05)


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_at_any_number_of_ranks_the_matrices_go_on(pair, aligned, ranks):
    config = aligning(pair, f"resumed{ranks}")
    stand_at(3, config, run=pair / "aligned")
    found = train(config, ranks)
    if ranks == 2:
        np.testing.assert_array_equal(series(found, *COLUMNS), series(aligned, *COLUMNS))
    np.testing.assert_allclose(series(found, *COLUMNS), series(aligned, *COLUMNS), rtol=1e-5)


def test_the_export_is_a_model_like_any_other(pair, aligned):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    folder = pair / "aligned" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= set(dict(model.named_parameters()))
    card = (folder / "README.md").read_text()
    assert "0.3 x hidden states (mse) + 0.2 x attention" in card


@pytest.mark.long
def test_layers_alone_can_be_learned_from(pair):
    """Without a distribution, by cosines, and of equal widths without a matrix."""
    tiny_llama(pair / "wide", vocab_size=512, num_hidden_layers=1, seed=2)
    config = aligning(
        pair,
        "alone",
        student={"model": str(pair / "wide"), "attention": "sdpa"},
        teacher={"attention": "sdpa"},
        train={"steps": 10, "lr": 1e-2},
        features={"hidden_layers": [(2, 1)], "hidden_loss": "cosine"},
        loss={"kd_weight": 0.0, "ce_weight": 0.0, "hidden_weight": 1.0, "attention_weight": 0.0},
    )
    found = train(config, 2)
    assert all(line["kd_loss"] is None and "attention_loss" not in line for line in found)
    hidden = series(found, "hidden_loss")[:, 0]
    assert (hidden > 0).all()
    assert hidden[-1] < 0.8 * hidden[0]
    np.testing.assert_allclose(series(found, "loss")[:, 0], hidden, rtol=1e-6)
    said = step_line(found[0], 10)
    assert f"  ce {found[0]['ce_loss']:.4f}  hidden {hidden[0]:.4f}  lr" in said


def test_phase_by_phase(pair):
    """The teacher's distributions, then its layers, then the text; matrices wait untouched."""
    config = aligning(
        pair,
        "phases",
        train={"steps": 10, "weight_decay": 0.0},
        loss={"curriculum": "three_phase", "attention_weight": 0.0},
    )
    found = train(config, 2)
    assert series(found, "hidden_weight")[:, 0].tolist() == [0.0] * 3 + [0.3] * 7
    assert series(found, "ce_weight")[:, 0].tolist() == [0.0] * 6 + [0.5] * 4
    for line in found:
        parts = line["hidden_weight"] * line["hidden_loss"] + line["ce_weight"] * line["ce_loss"]
        assert line["loss"] == pytest.approx(line["kd_loss"] + parts, rel=1e-6)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"teacher": {"mode": "cached"}, "targets": {"method": "topk"}},
            "loss.hidden_weight: aligns the student's layers with the teacher's, which no cache "
            "keeps",
        ),
        (
            {"teacher": {"attention": "sdpa"}},
            "teacher.attention: sdpa gives no attention weights to align, expected eager",
        ),
        ({"student": {"attention": "sdpa"}}, "student.attention: sdpa gives no attention weights"),
        ({"loss": {"kd_weight": 0.0, "curriculum": "three_phase"}}, "are both 0 at 0 of the run"),
        ({"features": {"hidden_layers": []}}, "hidden_layers"),
        ({"features": {"hidden_layers": [[1, 2, 3]]}}, "hidden_layers.0"),
    ],
)
def test_what_does_not_go_together_is_refused(pair, sections, expected):
    keys = aligning(pair, "none").model_dump(mode="json")
    for name, values in sections.items():
        keys[name] = {**keys[name], **values}
    with pytest.raises(ValueError, match=expected):
        Config.model_validate(keys)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (
            {"hidden_layers": [(3, 1)]},
            "features.hidden_layers.0: the teacher has 2 layers, found 3: expected 1 to 2, or "
            "-1, the "
            "last, to -2",
        ),
        (
            {"attention_layers": [(1, 1), (1, -4)]},
            "features.attention_layers.1: the student has 3 layers, found -4",
        ),
        (
            {"projection": "none"},
            "features.projection: none, and the teacher's hidden states are 64 wide, the "
            "student's 32",
        ),
    ],
)
def test_layers_that_are_not_there_are_refused_before_a_model_is_loaded(pair, features, expected):
    from megadistill.errors import ConfigError
    from megadistill.preflight import check_train

    with pytest.raises(ConfigError) as raised:
        check_train(aligning(pair, "none", features=features), world=2)
    assert str(raised.value).startswith(expected)
    assert not Path(pair / "none").exists()


def test_another_map_of_layers_is_another_run(pair, aligned):
    other = aligning(pair, "aligned", features={"hidden_layers": [(-1, -1)]})
    kind, text = run_ranks(1, "tests.train.runs:message", config=other)[0]
    assert kind == "RecipeError"
    assert "features.hidden_layers" in text
    assert run_ranks(1, RUN, config=aligning(pair, "aligned")) == [STEPS]
