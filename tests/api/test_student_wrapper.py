"""A transformers model wrapped as a student: its loss, its files, and models that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import megadistill
from megadistill.errors import ArgumentError
from tests.allocation import AllocationWatch
from tests.models.made import tiny_llama
from tests.student.loss.reference import dense_terms
from tests.train.stores import SEQ_LEN, VOCAB, make_store


def llama(folder: Path, **settings: Any) -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, **settings}
    return AutoModelForCausalLM.from_pretrained(tiny_llama(folder, **sizes), dtype=torch.float64)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> megadistill.Batch:
    cache = megadistill.open_cache(
        make_store(tmp_path_factory.mktemp("w") / "c", method="topk", masked=True)
    )
    return megadistill.collate([cache[i] for i in range(4)])


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_loss_and_gradients_are_the_dense_ones_and_the_model_saves_as_before(
    tmp_path: Path, batch: megadistill.Batch, settings: dict[str, Any]
) -> None:
    model, plain = (llama(tmp_path / "model", **settings) for _ in range(2))
    inputs = megadistill.forward_inputs(plain, batch.tokens_BT, batch.documents)
    hidden_NH = plain.model(**inputs).last_hidden_state.flatten(0, 1)
    options: dict[str, Any] = {"divergence": "reverse_kl", "ce_weight": 0.5, "temperature": 2.0}
    expected, kd_sum, ce_sum = dense_terms(
        hidden_NH, plain.lm_head.weight, batch.targets, batch.labels_BT.flatten(), **options
    )
    expected.backward()
    student = megadistill.wrap_student(model)
    output = student(batch, **options)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(output.kd_loss, kd_sum / batch.kd_count, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(output.ce_loss, ce_sum / batch.ce_count, rtol=1e-9, atol=1e-11)
    assert (output.kd_count, output.ce_count) == (batch.kd_count, batch.ce_count)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    ours = {name: p.grad for name, p in student.model.named_parameters()}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-10)

    torch.optim.SGD(student.parameters(), lr=0.1).step()
    student.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    ids = torch.arange(SEQ_LEN)[None]
    torch.testing.assert_close(again(ids).logits, student.model(ids).logits)
    assert student.model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, SEQ_LEN + 3)


def test_counts_of_the_whole_batch_make_gradient_accumulation_exact(
    tmp_path: Path, batch: megadistill.Batch
) -> None:
    cache = megadistill.open_cache(make_store(tmp_path / "c", method="topk", masked=True))
    parts = [megadistill.collate([cache[i]]) for i in range(4)]
    student = megadistill.wrap_student(llama(tmp_path / "model"))
    student(batch, ce_weight=0.5).loss.backward()
    whole = student.head.weight.grad.clone()
    student.zero_grad()
    counts = (sum(p.kd_count for p in parts), sum(p.ce_count for p in parts))
    for part in parts:
        student(part, ce_weight=0.5, normalizer=counts).loss.backward()
    torch.testing.assert_close(student.head.weight.grad, whole, rtol=1e-9, atol=1e-12)


def test_logits_of_all_positions_never_exist(tmp_path: Path, batch: megadistill.Batch) -> None:
    model = llama(tmp_path / "model", intermediate_size=48)
    inputs = megadistill.forward_inputs(model, batch.tokens_BT, batch.documents)
    elements = batch.tokens_BT.numel() * VOCAB
    with AllocationWatch() as watch:
        model(**inputs)
    assert watch.largest == elements
    student = megadistill.wrap_student(model)
    with AllocationWatch() as watch:
        student(batch, chunk_size=8).loss.backward()
    assert watch.largest < elements


def test_under_autocast_weights_keep_their_dtype_and_the_loss_is_near(
    tmp_path: Path, batch: megadistill.Batch
) -> None:
    student = megadistill.wrap_student(llama(tmp_path / "model").float())
    expected = student(batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = student(batch).loss
    loss.backward()
    assert student.head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=3e-2, atol=0)


def test_wrapping_again_and_other_modules_are_refused(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    student = megadistill.wrap_student(model)
    with pytest.raises(ArgumentError, match="model is wrapped already"):
        megadistill.wrap_student(model)
    with pytest.raises(ArgumentError, match="model is a Linear, expected a causal language model"):
        megadistill.wrap_student(torch.nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="batch is a dict, expected a Batch, as collate"):
        student({"input_ids": 1})


def test_an_unknown_option_of_the_loss_is_named(tmp_path: Path, batch: megadistill.Batch) -> None:
    student = megadistill.wrap_student(llama(tmp_path / "model"))
    with pytest.raises(ArgumentError, match="unknown keyword argument 'ce_wieght', expected one"):
        student(batch, ce_wieght=1.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocab_size": VOCAB - 1}, "model: has 95 token ids, the cache's teacher and tokenizer"),
        ({"max_position_embeddings": 8}, "seq_len: 16 is beyond the 8 positions of model"),
    ],
)
def test_a_model_that_does_not_fit_the_cache_is_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    cache = megadistill.open_cache(make_store(tmp_path / "cache"))
    with pytest.raises(ArgumentError) as caught:
        megadistill.wrap_student(llama(tmp_path / "model", **settings), cache)
    assert str(caught.value).startswith(said)


def test_a_model_whose_logits_the_head_does_not_know_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    scaled = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = scaled(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = forward
    with pytest.raises(ArgumentError, match="makes its logits in a way that our head does not"):
        megadistill.wrap_student(model)


def test_rows_above_the_caches_ids_are_padding(tmp_path: Path) -> None:
    cache = megadistill.open_cache(make_store(tmp_path / "cache"))
    student = megadistill.wrap_student(llama(tmp_path / "model", vocab_size=VOCAB + 32), cache)
    student(megadistill.collate([cache[0]]), ce_weight=1.0).loss.backward()
    assert (student.head.weight.grad[VOCAB:] == 0).all()


def test_a_mixture_of_experts_adds_its_own_balancing_loss(
    tmp_path: Path, batch: megadistill.Batch
) -> None:
    settings = AutoConfig.for_model(
        "mixtral",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings).float()
    inputs = megadistill.forward_inputs(model, batch.tokens_BT, batch.documents)
    balancing = model(**inputs).aux_loss
    student = megadistill.wrap_student(model)
    with_it = student(batch).loss
    student.student.router_loss_weight = 0.0
    torch.testing.assert_close(with_it - student(batch).loss, 0.5 * balancing)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tokens_BT": np.zeros(4, np.int64)}, "tokens_BT is torch.int64 [4], expected integers"),
        ({"tokens_BT": np.zeros((1, 4))}, "tokens_BT is torch.float64 [1, 4], expected integers"),
        ({"pack": "apart"}, "pack is 'apart', expected 'isolate' or 'concat'"),
        ({"documents": [[0], [0]]}, "documents has 2 elements, expected 1: one for each sequence"),
        ({"documents": [[0, 4]]}, "documents[0] is [0, 4], expected positions that rise from 0,"),
        ({"documents": [[1, 2]]}, "documents[0] is [1, 2], expected positions that rise from 0,"),
    ],
)
def test_inputs_that_do_not_fit_are_answered_in_a_line(
    tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    arguments = {"tokens_BT": np.zeros((1, 4), np.uint32), **arguments}
    with pytest.raises(ArgumentError) as caught:
        megadistill.forward_inputs(llama(tmp_path / "model"), **arguments)
    assert said in str(caught.value)


def test_inputs_of_packed_documents_are_those_of_each_document_alone(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    tokens_BT = torch.arange(12, dtype=torch.int32)[None]
    inputs = megadistill.forward_inputs(model, tokens_BT, [[0, 5]])
    packed = model(**inputs).logits[0]
    alone = [model(tokens_BT[:, part].long()).logits[0] for part in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(packed, torch.cat(alone))
    assert torch.equal(
        megadistill.forward_inputs(model, tokens_BT.numpy())["position_ids"], torch.arange(12)[None]
    )
