"""The codec: what comes back, within which error, and bad bytes that are found."""

from __future__ import annotations

import dataclasses
import random
import zlib

import numpy as np
import pytest
import torch

from megadistill.cache.codec import NonFiniteError, content, decode_targets, encode_targets
from megadistill.cache.quantizer import LEVELS, to_codes
from megadistill.cache.ranking import IdRanking
from megadistill.errors import CorruptBlockError
from megadistill.targets import SparseTargets
from megadistill.targets.streams.rounding import GRID
from tests.cache.targets import (
    METHODS,
    SAMPLED,
    assert_equal_targets,
    by_id,
    make_targets,
    raw_targets,
)

LISTED = ("topk", "topp")


def coded(t: SparseTargets, vocab_size: int = 1000, **options: object) -> SparseTargets:
    data = encode_targets(t, vocab_size=vocab_size, **options)
    return decode_targets(data, vocab_size=vocab_size, **options)


@pytest.mark.parametrize("method", ["multinomial", *LISTED])
@pytest.mark.parametrize("vocab_size", [1000, 65_537, 1 << 32])
@pytest.mark.parametrize("extras", [True, False])
def test_ids_and_counts_come_back_exactly(method: str, vocab_size: int, extras: bool) -> None:
    small = min(vocab_size, 1 << 22)
    t = raw_targets(method, positions=300, vocab_size=small, extras=extras)
    t.ids[0] = vocab_size - 1
    back = coded(t, vocab_size)
    left, right = by_id(t), by_id(back)
    for name in ("offsets", "ids", "truth_added"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    if method == "multinomial":
        np.testing.assert_array_equal(left.weights, right.weights)
    else:
        ratio = np.log(right.weights / left.weights)
        assert np.abs(ratio).max() < 0.0435  # a step: half for rounding, half for the whole row
        listed = np.add.reduceat(right.weights, right.offsets[:-1][right.counts > 0])
        assert np.abs(listed + right.tail[right.counts > 0] - 1).max() < 1e-6
    assert (back.entropy is None) == (not extras)


def test_varopt_weights_are_off_by_less_than_a_step_and_add_up_to_one() -> None:
    t = raw_targets("varopt", positions=2000)
    left, right = by_id(t), by_id(coded(t))
    weight = dict(zip(zip(*_names(right), strict=True), right.weights, strict=True))
    for name, expected in zip(zip(*_names(left), strict=True), left.weights, strict=True):
        found = weight.pop(name, 0.0)
        assert found == 0 or abs(found - expected) < 1 / GRID + 1e-6
    assert not weight  # no id came from nowhere
    has = right.counts > 0
    np.testing.assert_array_equal(has, left.counts > 0)
    sums = np.add.reduceat(right.weights.astype(np.float64), right.offsets[:-1][has])
    assert np.abs(sums - 1).max() < 1e-6


def _names(t: SparseTargets) -> tuple[list, list]:
    return np.repeat(np.arange(len(t)), t.counts).tolist(), t.ids.tolist()


@pytest.mark.parametrize("seed_given", [True, False])
def test_rounding_has_no_bias(seed_given: bool) -> None:
    """Heads of all sizes, one below a step, and a sampled rest: z below 4.5 for each of them."""
    row = np.array([0.6, 0.2, 0.11, 0.003, 0.0029, 0.0281, 0.0281, 0.0279], np.float64)
    row[5:] = (1 - row[:5].sum()) / 3
    n = 40_000
    rng = np.random.default_rng(1)
    t = SparseTargets(
        offsets=np.arange(n + 1) * len(row),
        ids=np.tile(np.arange(len(row)) * 7, n),
        weights=np.tile(row, n).astype(np.float32),
        tail=np.zeros(n, np.float32),
        method="varopt",
        heads=np.full(n, 5),
        rounding=rng.integers(0, 1 << 32, n) if seed_given else None,
    )
    back = coded(t)
    for i, expected in enumerate(row):
        found = np.zeros(n)
        mine = back.ids == i * 7
        found[np.repeat(np.arange(n), back.counts)[mine]] = back.weights[mine]
        error = found.std() / np.sqrt(n) + 1e-9
        assert abs(found.mean() - expected) < 4.5 * error, (i, found.mean(), expected)


@pytest.mark.parametrize("method", SAMPLED)
def test_what_came_back_is_encoded_to_the_same_bytes(method: str) -> None:
    data = encode_targets(raw_targets(method, positions=500), vocab_size=1000)
    again = encode_targets(decode_targets(data, vocab_size=1000), vocab_size=1000)
    assert again == data


@pytest.mark.parametrize("method", METHODS)
def test_torch_tensors_give_the_same_bytes_and_come_back_the_same(method: str) -> None:
    t = raw_targets(method, positions=200)
    data = encode_targets(t, vocab_size=1000)
    assert encode_targets(t.torch(), vocab_size=1000) == data
    ranking = IdRanking(np.random.default_rng(0).permutation(1000))
    for each in (None, ranking):
        there = decode_targets(data, vocab_size=1000, ranking=each, device="cpu")
        assert isinstance(there.ids, torch.Tensor)
        here = decode_targets(data, vocab_size=1000, ranking=each)
        assert_equal_targets(there.numpy(), here)
        np.testing.assert_array_equal(there.entropy.numpy(), here.entropy)
        np.testing.assert_array_equal(there.nll.numpy(), here.nll)


@pytest.mark.parametrize("method", METHODS)
def test_a_ranking_makes_frequent_ids_cheap_and_changes_no_target(method: str) -> None:
    counts = np.random.default_rng(0).permutation(1000)
    ranking = IdRanking.from_counts(counts)
    assert (np.diff(counts[ranking.ids]) < 0).all()
    plain = make_targets(method, positions=300)
    t = dataclasses.replace(plain, ids=ranking.ids[plain.ids])
    back = coded(t, ranking=ranking)
    np.testing.assert_array_equal(by_id(back).ids, by_id(t).ids)
    if method in SAMPLED:
        assert_equal_targets(back, t)
    cost = len(encode_targets(t, vocab_size=1000, ranking=ranking))
    assert cost == len(encode_targets(plain, vocab_size=1000))
    again = IdRanking.from_bytes(ranking.to_bytes(), vocab_size=1000, file="ids.bin")
    np.testing.assert_array_equal(again.ids, ranking.ids)


def test_no_positions_and_only_empty_ones_are_targets_too() -> None:
    for method in METHODS:
        empty = raw_targets(method).rows(0, 0)
        assert len(coded(empty, 9)) == 0
        t = raw_targets(method)
        none = dataclasses.replace(
            t,
            offsets=t.offsets * 0,
            ids=t.ids[:0],
            weights=t.weights[:0],
            tail=t.tail * 0,
            heads=None if t.heads is None else t.heads * 0,
            truth_added=None if t.truth_added is None else t.truth_added & False,
        )
        back = coded(none, 9)
        assert back.counts.tolist() == [0] * 12
        assert np.isnan(back.entropy).all()


def test_masked_positions_cost_next_to_nothing() -> None:
    t = raw_targets("varopt", positions=2000).rows(0, 0)
    masked = dataclasses.replace(
        t,
        offsets=np.zeros(2001, np.int64),
        tail=np.zeros(2000, np.float32),
        heads=np.zeros(2000, np.int64),
        entropy=np.full(2000, np.nan, np.float32),
        nll=None,
    )
    assert len(encode_targets(masked, vocab_size=1000)) < 2000 * 2 / 8 + 100


@pytest.mark.parametrize("method", METHODS)
def test_long_rows_and_unlikely_entries_fit(method: str) -> None:
    t = raw_targets(method, positions=4, most=45, vocab_size=5000)
    if method in LISTED:
        t.weights[-3:] = [1e-20, 1e-30, 0]
        n = 3000
        long = SparseTargets(
            offsets=np.array([0, n]),
            ids=np.arange(n) * 2,
            weights=np.linspace(2 / n, 0, n, dtype=np.float32),
            tail=np.zeros(1, np.float32),
            method=method,
        )
        back = coded(long, 1 << 14)
        assert back.counts.tolist() == [n]
        assert back.weights[-1] == 0
    if method == "multinomial":
        t = dataclasses.replace(
            t,
            offsets=np.array([0, 2]),
            ids=np.array([3, 1]),
            tail=np.zeros(1, np.float32),
            weights=np.array([999, 1], np.float32) / 1000,
            entropy=None,
            nll=None,
        )
    lost = t.counts - coded(t, 5000).counts
    assert (lost >= 0).all()
    assert lost.sum() <= (3 if method == "varopt" else 0)  # heads that were rounded to nothing


def test_a_flat_position_has_no_weight_below_nought() -> None:
    """The heaviest head is what the others leave: there must be something left."""
    for m in (1, 5, 200, 4000):
        rest = np.full(m, np.float32((1 - 1e-6) / m))
        t = SparseTargets(
            offsets=np.array([0, m + 1]),
            ids=np.arange(m + 1),
            weights=np.concatenate([[1e-6], rest]).astype(np.float32),
            tail=np.zeros(1, np.float32),
            method="varopt",
            heads=np.ones(1, np.int64),
        )
        for start in (0, 1 << 20, (1 << 32) - 1):
            back = coded(dataclasses.replace(t, rounding=np.array([start])), 5000)
            assert (back.weights > 0).all()
            assert abs(back.weights.sum(dtype=np.float64) - 1) < 1e-6


def test_content_is_the_same_however_the_symbols_are_deflated() -> None:
    t = raw_targets("varopt", positions=400, extras=False)
    data = encode_targets(dataclasses.replace(t, temperature=1.0), vocab_size=1000)
    unpacker = zlib.decompressobj(-15)
    symbols = unpacker.decompress(data[16:])
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    other = data[:16] + deflate.compress(symbols) + deflate.flush() + unpacker.unused_data
    assert other != data
    assert content(other) == content(data)
    assert_equal_targets(
        decode_targets(other, vocab_size=1000), decode_targets(data, vocab_size=1000)
    )


def test_levels_are_exact_and_near() -> None:
    assert (to_codes(LEVELS[np.arange(256)]) == np.arange(256)).all()
    values = np.linspace(0, 31.5, 10_001, dtype=np.float32)
    error = np.abs(LEVELS[to_codes(values)] - values)
    assert (error <= np.sqrt(values) / 45 + 2e-4).all()
    assert abs(error.mean()) < 0.06
    assert to_codes(np.array([np.nan, -1e-7, 1e9])).tolist() == [255, 0, 254]
    assert LEVELS.dtype == np.float32


@pytest.mark.parametrize("name", ["weights", "tail", "entropy", "nll"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5])
def test_what_is_not_finite_is_told_with_its_position(name: str, value: float) -> None:
    targets = raw_targets("topk")
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
    varopt, listed = raw_targets("varopt"), raw_targets("topk")
    for bad, says in (
        (dataclasses.replace(varopt, heads=None), "heads"),
        (dataclasses.replace(varopt, heads=varopt.counts + 1), "heads"),
        (dataclasses.replace(varopt, heads=varopt.heads * 0), "share one weight"),
        (dataclasses.replace(varopt, tail=varopt.tail + 1), "tail"),
        (dataclasses.replace(varopt, ids=varopt.ids - 1000), "ids go from"),
        (dataclasses.replace(varopt, ids=varopt.ids + 1000), "ids go from"),
        (dataclasses.replace(varopt, weights=varopt.weights / 2), "weights sum to 0.5"),
        (dataclasses.replace(varopt, method="multinomial", heads=None), "no counts of"),
        (dataclasses.replace(listed, truth_added=listed.counts < 2), "ground truth is added to"),
    ):
        with pytest.raises(ValueError, match=says):
            encode_targets(bad, vocab_size=1000)
    with pytest.raises(ValueError, match="ranking has 9 ids, expected 1000"):
        encode_targets(varopt, vocab_size=1000, ranking=IdRanking(np.arange(9)))
    with pytest.raises(ValueError, match="vocab_size"):
        encode_targets(varopt, vocab_size=0)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_were_changed_are_another_target_or_a_typed_error(method: str) -> None:
    data = encode_targets(raw_targets(method), vocab_size=1000)
    rng = random.Random(0)
    for length in range(len(data)):
        with pytest.raises(CorruptBlockError):
            decode_targets(data[:length], vocab_size=1000)
    with pytest.raises(CorruptBlockError):
        decode_targets(data + b"\0", vocab_size=1000)
    for _ in range(4000):
        bad = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            decoded = decode_targets(bytes(bad), vocab_size=1000)
        except CorruptBlockError:
            continue
        assert len(decoded.ids) == 0 or decoded.ids.max() < 1000
        assert np.isfinite(decoded.weights).all()
        assert (decoded.weights >= 0).all()


def test_ids_beyond_the_vocabulary_are_not_believed() -> None:
    data = encode_targets(raw_targets("topk"), vocab_size=1000)
    with pytest.raises(CorruptBlockError, match="ids below 3"):
        decode_targets(data, vocab_size=3)


@pytest.mark.parametrize("claim", [1 << 31, 70_000])
def test_symbols_that_cannot_be_there_are_refused_before_they_are_unpacked(claim: int) -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = bomb.compress(bytes(70_000)) + bomb.flush()
    header = bytes([1, 0, 0, 0]) + (9).to_bytes(4, "little") + claim.to_bytes(4, "little")
    with pytest.raises(CorruptBlockError, match="symbols"):
        decode_targets(header + bytes(4) + packed, vocab_size=9)


def test_a_ranking_that_is_no_permutation_is_refused() -> None:
    data = bytearray(IdRanking(np.arange(9)).to_bytes())
    for bad, says in (
        (data[:-1], "a ranking of 9 ids"),
        (b"x" + data[1:], "version 1"),
        (data[:-4] + data[-8:-4], "every id once"),
    ):
        with pytest.raises(CorruptBlockError, match=says):
            IdRanking.from_bytes(bytes(bad), vocab_size=9, file="ids.bin")


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_the_temperature_of_targets_comes_back(temperature):
    targets = dataclasses.replace(
        make_targets("topk", positions=9, vocab_size=50), temperature=temperature
    )
    found = decode_targets(encode_targets(targets, vocab_size=50), vocab_size=50)
    assert found.temperature == temperature
