"""Statistics: counts that add up exactly, and what people read from them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megadistill.cache.codec import decode_targets, encode_targets
from megadistill.cache.statistics import FIXED, block_statistics, combine, listed_mass, summary
from megadistill.targets import SparseTargets
from tests.cache.targets import METHODS, make_targets


def decoded(method: str, seed: int) -> tuple[SparseTargets, int]:
    data = encode_targets(make_targets(method, seed=seed), vocab_size=1000)
    return decode_targets(data, vocab_size=1000), len(data)


@pytest.mark.parametrize("method", METHODS)
def test_the_statistics_of_the_whole_are_the_sum_of_the_parts(method: str) -> None:
    targets, sizes = zip(*(decoded(method, seed) for seed in range(9)), strict=True)
    whole = block_statistics(list(targets), list(sizes))
    parts = [block_statistics(list(targets[a:b]), list(sizes[a:b])) for a, b in ((0, 4), (4, 9))]
    assert combine(parts) == combine(parts[::-1]) == whole
    assert whole["sequences"] == 9
    assert whole["positions"] == sum(int((t.counts > 0).sum()) for t in targets)
    assert whole["bytes"] == sum(sizes)


def test_the_summary_is_right_on_known_targets() -> None:
    targets = SparseTargets(
        offsets=np.array([0, 2, 3, 3]),
        ids=np.array([5, 6, 7]),
        weights=np.array([0.5, 0.25, 0.75], np.float32),
        tail=np.array([0.25, 0.25, 0], np.float32),
        method="topk",
        entropy=np.array([0.5, 2.0, 0], np.float32),
        nll=np.array([2.0, np.nan, np.nan], np.float32),
    )
    found = summary(block_statistics([targets], [100]))
    assert found["num_positions"] == 2
    assert found["entries_per_position"] == 1.5
    assert found["bytes_per_position"] == 50
    assert found["listed_mass"]["mean"] == 0.75
    assert abs(found["listed_mass"]["p50"] - 0.75) < 1 / 128
    assert found["entropy"] == {"mean": 1.25, "p05": 0.5, "p50": 0.5, "p95": 2.0}
    assert found["teacher_nll"]["mean"] == 2.0


def test_of_varopt_the_heads_are_the_listed_mass_and_of_multinomial_there_is_none() -> None:
    varopt = make_targets("varopt")
    expected = [
        np.rint(varopt.rows(n, n + 1).weights[: varopt.heads[n]].astype(np.float64) * FIXED).sum()
        for n in range(len(varopt))
    ]
    assert listed_mass(varopt).tolist() == expected
    assert summary(block_statistics([make_targets("multinomial")], [1]))["listed_mass"] is None


def test_what_was_not_kept_is_none() -> None:
    bare = dataclasses.replace(make_targets("varopt"), entropy=None, nll=None)
    found = summary(block_statistics([bare], [1]))
    assert found["entropy"] is found["teacher_nll"] is None
    assert summary(combine([]))["bytes_per_position"] is None
