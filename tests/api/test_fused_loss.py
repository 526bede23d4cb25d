"""The public loss: what a trainer has at hand, autocast, and each misuse in the caller's words."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import megadistill
from megadistill.errors import ArgumentError
from tests.student.loss.reference import dense_terms, random_targets

B, T, H, V = 2, 4, 5, 11
LABELS = [2, 4, -100, 0, 10, 3, -100, 7]


def problem(method: str = "topk", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_NH": torch.randn(B * T, H, dtype=dtype, generator=generator).requires_grad_(),
        "weight_VH": torch.randn(V, H, dtype=dtype, generator=generator).requires_grad_(),
        "targets": random_targets([3, 0, 1, 7, 11, 2, 5, 4], V, method=method),
        "labels_N": torch.tensor(LABELS),
    }


def loss_of(arguments: dict[str, Any], **options: Any) -> torch.Tensor:
    names = ("hidden_NH", "weight_VH", "targets", "labels_N")
    return megadistill.fused_linear_distillation(*(arguments[n] for n in names), **options)


@pytest.mark.parametrize(
    "changed",
    [
        lambda p: {"hidden_NH": p["hidden_NH"].reshape(B, T, H)},
        lambda p: {
            "hidden_NH": p["hidden_NH"].reshape(B, T, H),
            "labels_N": p["labels_N"].reshape(B, T),
        },
        lambda p: {"labels_N": p["labels_N"].reshape(B, T)},
        lambda p: {
            "hidden_NH": p["hidden_NH"].reshape(1, B * T, H),
            "labels_N": p["labels_N"].reshape(B, T),
        },
        lambda p: {"labels_N": p["labels_N"].numpy().astype(np.int16)},
        lambda p: {"labels_N": LABELS},
        lambda p: {"targets": p["targets"].numpy()},
        lambda p: {
            "targets": dataclasses.replace(
                p["targets"].numpy(),
                ids=p["targets"].ids.numpy().astype(np.uint32),
                offsets=p["targets"].offsets.numpy().astype(np.int32),
                weights=p["targets"].weights.numpy().astype(np.float64),
            )
        },
    ],
    ids=["3d", "3d labels", "2d labels", "packed", "int16", "list", "numpy", "dtypes"],
)
def test_value_and_gradients_are_the_dense_ones(changed: Any) -> None:
    given, plain = problem(), problem()
    loss = loss_of({**given, **changed(given)}, divergence="jsd", ce_weight=0.5)
    expected, *_ = dense_terms(*plain.values(), divergence="jsd", ce_weight=0.5)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    for name in ("hidden_NH", "weight_VH"):
        torch.testing.assert_close(given[name].grad, plain[name].grad, rtol=1e-9, atol=1e-11)


def test_uint32_labels_are_taken_where_every_position_has_one() -> None:
    given = {**problem(), "labels_N": np.arange(8, dtype=np.uint32)}
    signed = {**problem(), "labels_N": torch.arange(8)}
    assert loss_of(given) == loss_of(signed)


def test_numpy_hidden_states_and_weight_give_the_same_loss() -> None:
    given = problem()
    arrays = {name: given[name].detach().numpy() for name in ("hidden_NH", "weight_VH")}
    assert loss_of({**given, **arrays}) == loss_of(given).detach()


def test_autocast_casts_the_head_as_torchs_linear_layer_does() -> None:
    given, plain = problem(dtype=torch.float32), problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of({**given, "hidden_NH": given["hidden_NH"].bfloat16()}, ce_weight=0.5)
    expected, *_ = dense_terms(*plain.values(), ce_weight=0.5)
    loss.backward()
    expected.backward()
    assert loss.dtype == given["weight_VH"].grad.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-2, atol=0)
    torch.testing.assert_close(
        given["weight_VH"].grad, plain["weight_VH"].grad, rtol=5e-2, atol=1e-2
    )


def of(targets: Any, **changed: Any) -> Any:
    return dataclasses.replace(targets, **changed)


MISUSES: list[tuple[Any, str]] = [
    (lambda p: {"weight_VH": torch.zeros(V, H + 1)}, "weight_VH is [11, 6], expected [V, 5], as"),
    (lambda p: {"weight_VH": torch.zeros(H, V)}, "as wide as hidden_NH: pass its transpose"),
    (lambda p: {"weight_VH": p["weight_VH"].float()}, "weight_VH is torch.float32, hidden_NH is"),
    (lambda p: {"weight_VH": p["weight_VH"].to("meta")}, "weight_VH is on meta, hidden_NH on cpu"),
    (lambda p: {"hidden_NH": torch.zeros(5)}, "hidden_NH is [5], expected [N, columns] or [B, T,"),
    (lambda p: {"hidden_NH": torch.zeros(8, 5).int()}, "hidden_NH is int32, expected a floating"),
    (lambda p: {"hidden_NH": p["hidden_NH"][:7]}, "labels_N is [8], expected [7]: one row for"),
    (lambda p: {"labels_N": p["labels_N"][:7]}, "labels_N is [7], expected [8]: one row for each"),
    (
        lambda p: {
            "hidden_NH": p["hidden_NH"].reshape(B, T, H),
            "labels_N": p["labels_N"].reshape(T, B),
        },
        "labels_N is [4, 2], expected [2, 4] or [8]",
    ),
    (lambda p: {"labels_N": p["labels_N"].double()}, "labels_N is float64, expected integers"),
    (lambda p: {"labels_N": [0] * 7 + [V]}, "labels_N holds 11 at position 7, expected -100 or an"),
    (lambda p: {"labels_N": [0] * 7 + [-1]}, "labels_N holds -1 at position 7, expected -100 or"),
    (
        lambda p: {"labels_N": p["labels_N"].numpy().astype(np.uint32)},
        "holds 4294967196 at position 2, expected -100 or an id of the vocabulary, 0 to 10: that "
        "is -100 as an unsigned integer, pass signed labels",
    ),
    (lambda p: {"labels_N": p["labels_N"].to("meta")}, "labels_N is on meta, hidden_NH on cpu"),
    (lambda p: {"targets": {"ids": 1}}, "targets is a dict, expected SparseTargets, as"),
    (lambda p: {"targets": p["targets"].rows(0, 7)}, "targets have 7 positions, expected 8, as"),
    (
        lambda p: {"targets": p["targets"].torch("meta")},
        "targets are on meta, hidden_NH is on cpu: pass targets.torch('cpu')",
    ),
    (
        lambda p: {"targets": of(p["targets"], ids=p["targets"].ids + 1)},
        "target id 11 lies outside the head's 11 rows",
    ),
    (
        lambda p: {"targets": of(p["targets"], ids=p["targets"].weights)},
        "targets.ids is float32, expected integers",
    ),
]
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"divergence": "kl"}, "divergence: 'kl' is not known, expected one of forward_kl"),
    ({"temperature": 0}, "temperature is 0, expected a number more than 0"),
    ({"temperature": float("nan")}, "temperature is nan, expected a number more than 0"),
    ({"kd_weight": -1}, "kd_weight is -1, expected a number at least 0"),
    ({"ce_weight": "much"}, "ce_weight is 'much', expected a number at least 0"),
    ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected a number at least 0 and less"),
    ({"divergence": "jsd", "beta": 1.0}, "beta is 1.0, expected a number more than 0 and less"),
    ({"chunk_size": 0}, "chunk_size is 0, expected an integer of at least 1"),
    ({"mode": "backward"}, "mode is 'backward', expected one of forward, recompute"),
    ({"softcap": 0.0}, "softcap is 0.0, expected a number more than 0"),
    ({"vocab_size": 12}, "vocab_size is 12, expected at most 11, the rows of weight_VH"),
    ({"bias_V": torch.zeros(3)}, "bias_V is [3], expected [11]"),
    ({"normalizer": -1}, "normalizer is -1.0, expected a number at least 0"),
    ({"normalizer": (1, 2, 3)}, "normalizer is (1, 2, 3), expected one number or two"),
]


@pytest.mark.parametrize(("changed", "said"), MISUSES, ids=[said[:40] for _, said in MISUSES])
def test_arguments_that_do_not_fit_are_answered_in_a_line(changed: Any, said: str) -> None:
    given = problem()
    with pytest.raises(ArgumentError) as caught:
        loss_of({**given, **changed(given)})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "said"), OPTIONS, ids=[said[:40] for _, said in OPTIONS])
def test_options_that_do_not_fit_are_answered_in_a_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        loss_of(problem(), **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_divergence_that_the_targets_cannot_serve_is_named_without_configuration_keys() -> None:
    for options in ({"divergence": "reverse_kl"}, {"temperature": 2.0}):
        with pytest.raises(ArgumentError) as caught:
            loss_of(problem("varopt"), **options)
        line = str(caught.value)
        assert line.startswith(next(iter(options)))
        assert "varopt targets" in line
        assert "loss." not in line
        assert "targets." not in line


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(TypeError, match="'temprature'"):
        loss_of(problem(), temprature=2.0)
