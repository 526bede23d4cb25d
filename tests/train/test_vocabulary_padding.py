"""A student with more rows than the data has ids: they take no part, and the export has none."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megadistill.student.model import Student
from megadistill.train.vocabulary_padding import without_padding
from tests.models.made import tiny_llama
from tests.ranks import run_ranks
from tests.train.plain import plain_steps
from tests.train.stores import VOCAB, make_config, make_store
from tests.train.test_evaluate import plain_figures
from tests.train.test_loop import series, weights

ROWS = VOCAB + 32
SHAPE = {"hidden_size": 32, "intermediate_size": 48}


def padded(folder, *, tied, **sections):
    """A run of a student with ROWS rows; and the same with a student that has those of VOCAB."""
    whole = folder / "padded"
    tiny_llama(whole / "model", vocab_size=ROWS, tie_word_embeddings=tied, **SHAPE)
    make_store(whole / "cache", seed=1, method="topk")
    make_store(whole / "heldout", seed=5, method="topk", sequences=9)
    sections = {
        "targets": {"method": "topk"},
        "eval": {"cache": str(whole / "heldout")},
        "loss": {"ce_weight": 0.5, "label_smoothing": 0.1, "z_loss": 0.01, "divergence": "jsd"},
    } | sections
    config = make_config(whole, **sections)
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    model.resize_token_embeddings(VOCAB)
    model.save_pretrained(folder / "cut" / "model")
    student = config.student.model_copy(update={"model": str(folder / "cut" / "model")})
    return config, config.model_copy(update={"student": student})


@pytest.mark.parametrize("tied", [False, True])
def test_it_trains_and_is_exported_as_a_student_without_the_rows(tmp_path, tied):
    config, cut = padded(tmp_path, tied=tied)
    assert run_ranks(2, "tests.train.runs:run", config=config) == [4, 4]
    expected, parameters = plain_steps(cut)
    np.testing.assert_allclose(series(config, "loss", "grad_norm"), expected, rtol=1e-5)
    exported = weights(config)
    for name, value in exported.items():
        torch.testing.assert_close(value, parameters[name].detach(), rtol=1e-4, atol=2e-5)
    assert exported["model.embed_tokens.weight"].shape == (VOCAB, 32)
    model = AutoModelForCausalLM.from_pretrained(f"{config.train.out_dir}/model")
    assert model.config.vocab_size == VOCAB
    assert model(torch.arange(6)[None]).logits.shape == (1, 6, VOCAB)


def test_evaluation_leaves_them_out_and_so_does_what_is_loaded_from_the_export(tmp_path):
    config, _ = padded(tmp_path, tied=False)
    run_ranks(1, "tests.train.runs:run", config=config)
    with open(f"{config.train.out_dir}/eval.jsonl") as file:
        figures = json.loads(file.readlines()[-1])
    student = config.student.model_copy(update={"model": f"{config.train.out_dir}/model"})
    expected = plain_figures(config.model_copy(update={"student": student}), 9)
    for name in ("loss", "kl", "top1_agreement"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-5), name


def test_what_would_be_the_softmax_of_all_rows_is_another(tmp_path):
    """The test above could not tell otherwise."""
    config, cut = padded(tmp_path, tied=False)
    whole = plain_figures(config, 9)["loss"]
    assert abs(whole - plain_figures(cut, 9)["loss"]) > 0.1
    assert math.isfinite(whole)


def test_a_special_token_among_the_padding_keeps_the_rows_up_to_it(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ROWS,
            pad_token_id=VOCAB + 3,
            **SHAPE,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    student = Student(model, vocab_size=VOCAB)
    with without_padding(student, dict(model.state_dict())) as state:
        assert model.config.vocab_size == VOCAB + 4
        model.save_pretrained(tmp_path / "model", state_dict=state)
    assert model.config.vocab_size == ROWS
    assert len(load_file(tmp_path / "model/model.safetensors")["lm_head.weight"]) == VOCAB + 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
