"""Targets from what a trainer has at hand, and each misuse in the caller's words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import megadistill
from megadistill.errors import ArgumentError
from megadistill.teacher.select import select_targets as kernel
from tests.cache.targets import assert_equal_targets, raw_targets

B, T, V = 2, 6, 40
PARAMETERS: dict[str, dict[str, Any]] = {
    "varopt": {"tau": 0.1},
    "multinomial": {"draws": 20},
    "topk": {"k": 4},
    "topp": {"p": 0.7, "k": 9},
}
DRAWN = ("varopt", "multinomial")


def log_probs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(B * T, V, generator=generator, dtype=dtype).mul_(2).log_softmax(-1)


def keys() -> torch.Tensor:
    return torch.stack([torch.arange(B).repeat_interleave(T), torch.arange(T).repeat(B)], 1)


def labels() -> torch.Tensor:
    ids = torch.arange(B * T) % V
    ids[T - 1 :: T] = -100
    return ids


@pytest.mark.parametrize("method", PARAMETERS)
def test_numpy_3d_and_integers_of_any_kind_select_what_the_kernel_selects(method: str) -> None:
    expected = kernel(
        log_probs(), method=method, keys_N=keys(), labels_N=labels(), seed=5, **PARAMETERS[method]
    )
    common: dict[str, Any] = {"method": method, "seed": 5, **PARAMETERS[method]}
    drawn = {"keys_N": keys().reshape(B, T, 2).int()} if method in DRAWN else {}
    as_torch = megadistill.select_targets(
        log_probs().reshape(B, T, V), labels_N=labels().reshape(B, T).short(), **drawn, **common
    )
    drawn = {"keys_N": keys().numpy().astype(np.uint32)} if method in DRAWN else {}
    as_numpy = megadistill.select_targets(
        log_probs().numpy(), labels_N=labels().numpy().astype(np.int16), **drawn, **common
    )
    assert isinstance(as_torch.ids, torch.Tensor)
    assert isinstance(as_numpy.ids, np.ndarray)
    assert_equal_targets(as_torch.numpy(), expected.numpy())
    assert_equal_targets(as_numpy, expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    rows = log_probs()[:, :4].log_softmax(-1).to(dtype)  # few enough ids that bfloat16 sums to 1
    ours = megadistill.select_targets(rows, method="topk", k=2)
    values, ids = rows.float().topk(2)
    assert torch.equal(ours.ids.reshape(-1, 2), ids)
    torch.testing.assert_close(ours.weights.reshape(-1, 2), values.exp(), rtol=2e-2, atol=1e-3)


def test_a_read_only_array_is_taken_without_a_warning() -> None:
    rows = log_probs().numpy()
    rows.flags.writeable = False
    assert len(megadistill.select_targets(rows, method="topk", k=2)) == B * T


MISUSES: list[tuple[dict[str, Any], str]] = [
    ({"log_probs_NV": torch.randn(3, V) + 5}, "row 0: exp() of it sums to .*, expected 1: logits"),
    ({"log_probs_NV": torch.full((3, V), 1 / V)}, "row 0: holds probabilities, expected their log"),
    ({"log_probs_NV": torch.full((3, V), torch.nan)}, "row 0: holds nan or inf"),
    ({"log_probs_NV": torch.zeros(V)}, "log_probs_NV is [40], expected [N, columns] or"),
    ({"log_probs_NV": torch.zeros(3, V).long()}, "log_probs_NV is int64, expected a floating"),
    ({"log_probs_NV": "a"}, "log_probs_NV is a str, expected a torch tensor or a numpy array"),
    ({"method": "top_k"}, "method is 'top_k', expected one of varopt, multinomial, topk, topp"),
    ({"tau": 0.1}, "tau is given, but method topk takes k"),
    ({"k": 0}, "k is 0, expected an integer of at least 1"),
    ({"k": 2.5}, "k is 2.5, expected an integer of at least 1"),
    ({"method": "topp", "p": 1.5}, "p is 1.5, expected a number more than 0 and at most 1"),
    ({"method": "varopt"}, "keys_N is None, but varopt draws at random: pass (sequence number, "),
    ({"method": "multinomial"}, "keys_N is None, but multinomial draws at random"),
    ({"keys_N": torch.zeros(12)}, "keys_N is float32, expected integers"),
    ({"keys_N": torch.zeros(12, 3).long()}, "keys_N is [12, 3], expected [12, 2]: one row for"),
    ({"labels_N": torch.zeros(7).long()}, "labels_N is [7], expected [12]: one row for each"),
    ({"labels_N": torch.zeros(12)}, "labels_N is float32, expected integers"),
    ({"labels_N": [0] * 11 + [V]}, "labels_N holds 40 at position 11, expected -100 or an id of"),
    ({"labels_N": torch.zeros(12).long().to("meta")}, "labels_N is on meta, log_probs_NV on cpu"),
    ({"temperature": 0.0}, "temperature is 0.0, expected a number more than 0"),
    ({"min_entropy": -1.0}, "min_entropy is -1.0, expected a number at least 0"),
]


@pytest.mark.parametrize(("changed", "said"), MISUSES)
def test_misuse_is_answered_in_a_line(changed: dict[str, Any], said: str) -> None:
    arguments = {"log_probs_NV": log_probs(), "method": "topk", **changed}
    with pytest.raises(ArgumentError) as caught:
        megadistill.select_targets(arguments.pop("log_probs_NV"), **arguments)
    line = str(caught.value)
    assert "\n" not in line
    for part in said.split(".*"):
        assert part in line


def test_rows_without_a_label_may_hold_anything_and_the_bad_row_is_the_one_named() -> None:
    rows = log_probs()
    rows[T - 1] = torch.nan
    rows[8] = 3.0
    with pytest.raises(ArgumentError, match="row 8: exp"):
        megadistill.select_targets(rows, method="topk", labels_N=labels())


@pytest.mark.parametrize("method", PARAMETERS)
def test_coding_takes_tensors_and_small_integers(method: str) -> None:
    import dataclasses

    raw = raw_targets(method, vocab_size=1000)
    ranking = megadistill.IdRanking.from_counts(np.arange(1000))
    data = megadistill.encode_targets(raw, vocab_size=1000, ranking=ranking)
    small = dataclasses.replace(
        raw.torch(), ids=raw.torch().ids.int(), offsets=raw.torch().offsets.int()
    )
    assert megadistill.encode_targets(small, vocab_size=1000, ranking=ranking) == data
    back = megadistill.decode_targets(data, vocab_size=1000, ranking=ranking)
    there = megadistill.decode_targets(
        memoryview(data), vocab_size=1000, ranking=ranking, device="cpu"
    )
    assert isinstance(there.ids, torch.Tensor)
    assert_equal_targets(there.numpy(), back)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"targets": {}}, "targets is a dict, expected SparseTargets"),
        ({"vocab_size": 0}, "vocab_size is 0, expected an integer of at least 1"),
        ({"vocab_size": 10}, "ids go from"),
        ({"ranking": [1, 0]}, "ranking is a list, expected IdRanking, for example"),
        ({"ranking": megadistill.IdRanking(np.arange(9))}, "ranking has 9 ids, expected 1000"),
    ],
)
def test_misuse_of_coding_is_answered_in_a_line(arguments: dict[str, Any], said: str) -> None:
    arguments = {"targets": raw_targets("topk"), "vocab_size": 1000, **arguments}
    with pytest.raises(ArgumentError) as caught:
        megadistill.encode_targets(arguments.pop("targets"), **arguments)
    assert said in str(caught.value)
    with pytest.raises(ArgumentError, match="data is a str, expected bytes"):
        megadistill.decode_targets("abc", vocab_size=1000)  # type: ignore[arg-type]
