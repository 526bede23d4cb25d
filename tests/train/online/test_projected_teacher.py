"""An online teacher with another tokenizer: its hidden states, projected."""

import json

import numpy as np
import pytest
import torch

from megadistill.config import Config
from megadistill.errors import ConfigError
from tests.models.made import teacher_and_text, tiny_llama, tiny_tokenizer
from tests.ranks import run_ranks
from tests.train.online.test_online_teacher import series, settings, stand_at, train
from tests.train.test_features import PARTITIONED

STEPS = 6
COLUMNS = ("loss", "kd_loss", "ce_loss", "projector_loss", "grad_norm")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A teacher, and a narrower student of a smaller vocabulary; the text has other letters too."""
    folder = teacher_and_text(tmp_path_factory.mktemp("pair"), documents=100)
    tiny_llama(folder / "student", vocab_size=320, hidden_size=32, intermediate_size=48, seed=1)
    tiny_tokenizer(folder / "student", vocab_size=320)
    with (folder / "text.jsonl").open("a") as file:
        for i in range(40):
            line = f"Der Bär {i} trägt das Übermaß naïve \u5c0f\u718a \U0001f43b"
            file.write(json.dumps({"text": line}) + "\n")
    return folder


def projecting(pair, out, **sections):
    keys = {
        "data": {"tokenizer": str(pair / "student")},
        "targets": {"method": "projected"},
        "train": {"steps": STEPS, "save_every": 1, "keep": 99},
    }
    for section, values in sections.items():
        keys[section] = {**keys.get(section, {}), **values}
    return settings(pair, out, **keys)


@pytest.fixture(scope="module")
def projected(pair):
    return train(projecting(pair, "projected"), 2)


def test_it_is_what_a_plain_torch_loop_does(pair, projected):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megadistill.blocks import open_store
    from megadistill.data.alignment import Alignment
    from megadistill.models.attention import forward_inputs
    from tests.train.plain import batch_of, clip_and_step, optimizer_and_order

    config = projecting(pair, "projected")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32)
        for name in ("teacher", "student")
    )
    tokenizers = [AutoTokenizer.from_pretrained(pair / name) for name in ("student", "teacher")]
    alignment = Alignment(*tokenizers)
    ours, theirs = (each.get_vocab() for each in tokenizers)
    both = sorted(set(ours) & set(theirs) - {"<|end|>"})
    assert 250 < len(both) < 320
    W, U = (
        model.lm_head.weight.detach()[[vocabulary[token] for token in both]].double()
        for model, vocabulary in ((student, ours), (teacher, theirs))
    )
    gram = W.T @ W
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(32)
    matrix = torch.nn.Parameter(torch.linalg.solve(gram, W.T @ U).float())
    store = open_store(pair / "tokens")
    all_of_it = torch.nn.ModuleList([student, torch.nn.ParameterList([matrix])])
    optimizer, order = optimizer_and_order(config, all_of_it, store)
    for step in range(STEPS):
        tokens_BT, documents, labels_N = batch_of(store, order, step)
        aligned = alignment.align(tokens_BT, documents)
        rows = torch.as_tensor(aligned.rows_N)
        with torch.no_grad():
            states = teacher.model(
                **forward_inputs(teacher, aligned.tokens_BU, aligned.documents)
            ).last_hidden_state.flatten(0, 1)
        valid = labels_N != -100
        said = valid & (rows >= 0)
        assert 0.4 * valid.sum() < said.sum() < valid.sum()
        z = student(**forward_inputs(student, tokens_BT, documents)).logits.flatten(0, 1)
        W = student.lm_head.weight.detach()
        own = states[rows[said]] @ matrix.T @ W.T
        p, q = own.detach().log_softmax(1), z[said].log_softmax(1)
        kd = (p.exp() * (p - q)).sum(1).mean()
        ce = torch.nn.functional.cross_entropy(z[valid], labels_N[valid])
        projector = torch.nn.functional.cross_entropy(own, labels_N[said])
        loss = kd + 0.5 * ce + projector
        norm = clip_and_step(optimizer, all_of_it, loss, step, config.train)
        expected = [x.item() for x in (loss, kd, ce, projector, norm)]
        np.testing.assert_allclose([projected[step][c] for c in COLUMNS], expected, rtol=2e-5)


@pytest.mark.parametrize(
    ("ranks", "tp", "engine"),
    [(1, 1, "tensor_parallel"), (2, 2, "tensor_parallel"), (2, 1, "zero3")],
)
def test_every_layout_of_the_teacher_trains_alike(pair, projected, ranks, tp, engine):
    config = projecting(
        pair, f"{engine}{ranks}{tp}", teacher={"tp": tp, "engine": engine}, deepspeed=PARTITIONED
    )
    found = train(config, ranks, tp)
    np.testing.assert_allclose(series(found, *COLUMNS), series(projected, *COLUMNS), rtol=2e-5)


def test_in_bfloat16_it_is_about_the_same(pair, projected):
    config = projecting(
        pair,
        "bf16",
        teacher={"dtype": "bfloat16"},
        deepspeed={"bf16": {"enabled": True}, **PARTITIONED},
    )
    found = train(config, 2)
    np.testing.assert_allclose(series(found, *COLUMNS), series(projected, *COLUMNS), rtol=0.05)


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_at_any_number_of_ranks_the_projector_goes_on(pair, projected, ranks):
    config = projecting(pair, f"resumed{ranks}")
    stand_at(3, config, run=pair / "projected")
    found = train(config, ranks)
    if ranks == 2:
        np.testing.assert_array_equal(series(found, *COLUMNS), series(projected, *COLUMNS))
    np.testing.assert_allclose(series(found, *COLUMNS), series(projected, *COLUMNS), rtol=2e-5)


def test_the_export_is_the_student_alone(pair, projected):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pair / "projected" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)) == 320
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= set(dict(model.named_parameters()))


def test_a_student_that_is_its_teacher_agrees_from_the_start(pair):
    """Of one tokenizer, head and width the projector begins as (nearly) the identity."""
    config = projecting(
        pair,
        "itself",
        data={"tokenizer": None, "dir": str(pair / "tokens-2")},
        student={"model": str(pair / "teacher")},
        train={"steps": 1, "warmup_steps": 0},
        loss={"divergence": "jsd", "ce_weight": 0.0},
    )
    [line] = train(config, 2)
    assert line["kd_loss"] < 1e-4
    assert line["projector_loss"] == pytest.approx(line["ce_loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"targets": {"method": "exact"}},
            "teacher.model: the tokenizer of {pair}/teacher turns text into other ids than "
            "{pair}/student "
            "does",
        ),
        (
            {"data": {"tokenizer": None}, "targets": {"method": "exact"}},
            "student.model: {pair}/student has a vocabulary of 320, the tokenizer {pair}/teacher "
            "has 512",
        ),
        (
            {"loss": {"hidden_weight": 1.0}},
            "loss.hidden_weight: the teacher {pair}/teacher has another tokenizer than "
            "{pair}/student, "
            "so its layers stand at other positions: set it to 0",
        ),
    ],
)
def test_what_needs_the_same_tokens_is_refused_of_others(pair, sections, expected):
    from megadistill.preflight import check_train

    with pytest.raises(ConfigError) as raised:
        check_train(projecting(pair, "none", **sections), world=2)
    assert str(raised.value).startswith(expected.format(pair=pair))
    if "targets" in sections and "data" not in sections:
        assert "targets.method=projected data.tokenizer=(the student's)" in str(raised.value)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"teacher": {"mode": "cached"}, "student": None}, "targets.method: projected"),
        ({"targets": {"temperature": 2.0}}, "targets.temperature: 2 with targets.method=projected"),
        (
            {"teacher": {"ensemble": [{"model": "x"}]}},
            "teacher.ensemble: with targets.method=projec",
        ),
        ({"loss": {"ground_truth_residual": True}}, "true with projected targets"),
    ],
)
def test_what_does_not_go_together_is_refused(pair, sections, expected):
    keys = projecting(pair, "none").model_dump(mode="json")
    for name, values in sections.items():
        keys[name] = None if values is None else {**keys[name], **values}
    with pytest.raises(ValueError, match=expected):
        Config.model_validate(keys)


def test_a_document_longer_than_the_teacher_was_made_for_is_refused(pair):
    tiny_llama(pair / "short", max_position_embeddings=26)
    tiny_tokenizer(pair / "short", vocab_size=257)  # bytes
    config = projecting(
        pair,
        "short-run",
        teacher={"model": str(pair / "short")},
        student={"model": str(pair / "teacher")},
        data={"tokenizer": str(pair / "teacher"), "dir": str(pair / "tokens-3")},
    )
    kind, text = run_ranks(1, "tests.train.runs:message", config=config)[0]
    assert kind == "TeacherError"
    assert "of the teacher's tokens, expected at most 26, its max_position_embeddings" in text
