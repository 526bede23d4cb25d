"""Made-up targets of every method, a function of the seed alone."""

from __future__ import annotations

import numpy as np

from megadistill.targets import SparseTargets


def make_targets(
    method: str, *, positions: int = 12, vocab_size: int = 1000, seed: int = 0, extras: bool = True
) -> SparseTargets:
    """Ragged rows, some of them empty; with entropy and nll (nan in the last row) by `extras`."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 7, positions)
    rows = [rng.choice(vocab_size, n, replace=False) for n in counts]
    heads = np.minimum(rng.integers(1, 7, positions), counts)
    weights, tails = [], []
    for n, h in zip(counts, heads, strict=True):
        p = rng.dirichlet(np.ones(n + 1)).astype(np.float32)
        row = p[:n].copy()
        if method == "varopt" and n > h:
            row[h:] = np.float32((1 - row[:h].sum()) / (n - h))
        elif method == "multinomial":
            row = (rng.integers(1, 9, n) / 50).astype(np.float32)
        weights.append(row)
        tails.append(p[n] if method in ("topk", "topp") else 0)
    entropy = rng.exponential(2, positions).astype(np.float32)
    nll = rng.exponential(3, positions).astype(np.float32)
    nll[-1] = np.nan
    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids=np.concatenate(rows).astype(np.int64),
        weights=np.concatenate(weights).astype(np.float32),
        tail=np.array(tails, np.float32),
        method=method,
        temperature=0.7,
        entropy=entropy if extras else None,
        nll=nll if extras else None,
        heads=heads.astype(np.int64) if method == "varopt" else None,
        truth_added=(rng.random(positions) < 0.3) if method in ("topk", "topp") else None,
    )


def assert_equal_targets(left: SparseTargets, right: SparseTargets) -> None:
    """Equal but for entropy and nll, which the codec rounds."""
    assert (left.method, left.temperature) == (right.method, right.temperature)
    for name in ("offsets", "ids", "weights", "tail", "heads", "truth_added"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)
