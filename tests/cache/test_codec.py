"""The codec: everything comes back, bad input is told, bad bytes are found."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from megadistill.cache.codec import NonFiniteError, decode_targets, encode_targets
from megadistill.cache.levels import LEVELS, from_codes, to_codes
from megadistill.errors import CorruptBlockError
from megadistill.targets import METHODS
from tests.cache.targets import assert_equal_targets, make_targets


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vocab_size", [1000, 65_536, 65_537, 1 << 24, 1 << 32])
@pytest.mark.parametrize("extras", [True, False])
def test_targets_come_back_bit_for_bit(method: str, vocab_size: int, extras: bool) -> None:
    targets = make_targets(method, positions=40, vocab_size=min(vocab_size, 1 << 22), extras=extras)
    targets.ids[0] = vocab_size - 1
    data = encode_targets(targets, vocab_size=vocab_size)
    decoded = decode_targets(data, vocab_size=vocab_size)
    assert_equal_targets(decoded, targets)
    assert encode_targets(decoded, vocab_size=vocab_size) == data


@pytest.mark.parametrize("method", METHODS)
def test_torch_tensors_give_the_same_bytes(method: str) -> None:
    targets = make_targets(method)
    data = encode_targets(targets, vocab_size=1000)
    assert encode_targets(targets.torch(), vocab_size=1000) == data


def test_no_positions_and_only_empty_ones_are_targets_too() -> None:
    empty = make_targets("varopt").rows(0, 0)
    assert len(decode_targets(encode_targets(empty, vocab_size=9), vocab_size=9)) == 0
    t = make_targets("topk")
    none = dataclasses.replace(t, offsets=t.offsets * 0, ids=t.ids[:0], weights=t.weights[:0])
    decoded = decode_targets(encode_targets(none, vocab_size=9), vocab_size=9)
    assert decoded.counts.tolist() == [0] * 12


def test_the_tail_of_varopt_costs_four_bytes_a_position() -> None:
    targets = make_targets("varopt", positions=200, extras=False)
    sampled = int((targets.counts > targets.heads).sum())
    expected = 24 + 2 * 200 + 2 * len(targets.ids) + 4 * (int(targets.heads.sum()) + sampled)
    assert len(encode_targets(targets, vocab_size=1000)) == expected


def test_levels_are_exact_and_near() -> None:
    assert (to_codes(from_codes(np.arange(256))) == np.arange(256)).all()
    values = np.linspace(0, 31.5, 10_001, dtype=np.float32)
    error = np.abs(from_codes(to_codes(values)) - values)
    assert (error <= np.sqrt(values) / 45 + 2e-4).all()
    assert abs(error.mean()) < 0.06
    assert to_codes(np.array([np.nan, -1e-7, 1e9])).tolist() == [255, 0, 254]
    assert LEVELS.dtype == np.float32


@pytest.mark.parametrize("name", ["weights", "tail", "entropy", "nll"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5])
def test_what_is_not_finite_is_told_with_its_position(name: str, value: float) -> None:
    targets = make_targets("topk")
    position = int(np.argmax(targets.counts > 0))
    array = getattr(targets, name).copy()
    array[0 if name == "weights" else position] = value
    bad = dataclasses.replace(targets, **{name: array})
    if name == "nll" and np.isnan(value):
        encode_targets(bad, vocab_size=1000)  # there is no true next token
        return
    with pytest.raises(NonFiniteError, match=f"position {position}: {name.rstrip('s')}"):
        encode_targets(bad, vocab_size=1000)


def test_targets_that_are_not_what_their_method_says_are_refused() -> None:
    varopt = make_targets("varopt")
    for bad, says in (
        (dataclasses.replace(varopt, heads=None), "heads"),
        (dataclasses.replace(varopt, heads=varopt.counts + 1), "heads"),
        (dataclasses.replace(varopt, heads=varopt.heads * 0), "share one weight"),
        (dataclasses.replace(varopt, tail=varopt.tail + 1), "tail"),
        (dataclasses.replace(varopt, ids=varopt.ids - 1000), "ids go from"),
        (dataclasses.replace(varopt, ids=varopt.ids + 1000), "ids go from"),
    ):
        with pytest.raises(ValueError, match=says):
            encode_targets(bad, vocab_size=1000)
    with pytest.raises(ValueError, match="codec"):
        encode_targets(varopt, vocab_size=1000, codec="zstd")
    with pytest.raises(ValueError, match="vocab_size"):
        encode_targets(varopt, vocab_size=0)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_were_changed_are_another_target_or_a_typed_error(method: str) -> None:
    data = encode_targets(make_targets(method), vocab_size=1000)
    rng = random.Random(0)
    for length in range(len(data)):
        with pytest.raises(CorruptBlockError):
            decode_targets(data[:length], vocab_size=1000)
    with pytest.raises(CorruptBlockError):
        decode_targets(data + b"\0", vocab_size=1000)
    for _ in range(2000):
        bad = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            decoded = decode_targets(bytes(bad), vocab_size=1000)
        except CorruptBlockError:
            continue
        assert len(decoded.ids) == 0 or decoded.ids.max() < 1000


def test_targets_of_another_vocabulary_width_are_not_believed() -> None:
    data = encode_targets(make_targets("topk"), vocab_size=1000)
    with pytest.raises(CorruptBlockError, match="a header of targets"):
        decode_targets(data, vocab_size=100_000)
    with pytest.raises(CorruptBlockError, match="ids below 3"):
        decode_targets(data, vocab_size=3)
