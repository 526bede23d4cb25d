"""Sparse targets as rows: cutting and joining are what lists of rows do."""

import numpy as np
import pytest

from megadistill.targets import SparseTargets, concatenate

ROWS = [[(3, 0.5), (9, 0.25)], [], [(1, 1.0)], [(2, 0.5), (4, 0.25), (8, 0.125)]]


def sparse(rows, kind="numpy", **changes) -> SparseTargets:
    entries = [entry for row in rows for entry in row]
    made = SparseTargets(
        offsets=np.cumsum([0, *map(len, rows)]),
        ids=np.array([i for i, _ in entries], np.int64),
        weights=np.array([w for _, w in entries], np.float32),
        tail=np.array([1 - sum(w for _, w in row) for row in rows], np.float32),
        method="topk",
        **changes,
    )
    return made if kind == "numpy" else made.torch()


def lists(targets: SparseTargets):
    t = targets.numpy()
    return [
        list(zip(t.ids[a:b].tolist(), t.weights[a:b].tolist(), strict=True))
        for a, b in zip(t.offsets[:-1], t.offsets[1:], strict=True)
    ]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_rows_are_those_of_the_list(kind):
    whole = sparse(ROWS, kind, entropy=np.arange(4, dtype=np.float32))
    for start in range(5):
        for stop in range(start, 5):
            part = whole.rows(start, stop)
            assert lists(part) == ROWS[start:stop]
            assert part.numpy().entropy.tolist() == [0.0, 1.0, 2.0, 3.0][start:stop]
            assert len(part) == stop - start


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_joined_parts_are_the_whole(kind):
    parts = [sparse(rows, kind) for rows in (ROWS[:2], ROWS[2:3], [], ROWS[3:], ROWS)]
    assert lists(concatenate(parts)) == ROWS + ROWS


def test_padded_rows_end_with_weight_0():
    ids, weights = sparse(ROWS).padded()
    assert ids.tolist() == [[3, 9, 0], [0, 0, 0], [1, 0, 0], [2, 4, 8]]
    assert weights.tolist() == [[0.5, 0.25, 0], [0, 0, 0], [1, 0, 0], [0.5, 0.25, 0.125]]


def test_targets_of_two_temperatures_are_not_joined():
    with pytest.raises(ValueError, match=r"topk at temperature 1\.0 with topk at 2\.0"):
        concatenate([sparse(ROWS), sparse(ROWS, temperature=2.0)])
