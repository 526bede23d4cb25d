"""Made-up targets of every method, a function of the seed alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megadistill.cache.codec import decode_targets, encode_targets
from megadistill.targets import SparseTargets

METHODS = ("varopt", "multinomial", "topk", "topp")
SAMPLED = ("varopt", "multinomial")
PER_ENTRY = ("ids", "weights")
PER_POSITION = ("offsets", "tail", "heads", "truth_added")


def make_targets(method: str, *, vocab_size: int = 1000, **settings: Any) -> SparseTargets:
    """raw_targets as the codec gives them back, to be told from others bit for bit."""
    raw = raw_targets(method, vocab_size=vocab_size, **settings)
    return decode_targets(encode_targets(raw, vocab_size=vocab_size), vocab_size=vocab_size)


def raw_targets(
    method: str,
    *,
    positions: int = 12,
    vocab_size: int = 1000,
    seed: int = 0,
    extras: bool = True,
    most: int = 6,
) -> SparseTargets:
    """Rows of up to `most` entries, some empty; entropy, nll (nan in the last row) by `extras`."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most + 1, positions)
    truth = (rng.random(positions) < 0.3) & (counts > 1) if method not in SAMPLED else None
    heads = np.minimum(rng.integers(1, most + 1, positions), counts)
    ids, weights, tails = [], [], []
    for n, h in zip(counts, heads, strict=True):
        ids.append(rng.choice(vocab_size, n, replace=False))
        p = rng.dirichlet(np.ones(n + 1)).astype(np.float32)
        tails.append(0 if method in SAMPLED else p[n])
        row = p[:n].copy()
        if method == "varopt" and n:
            row /= row.sum()
            row[h:] = row[h:].mean() if n > h else 0
        elif method == "multinomial" and n:
            row = (1 + rng.multinomial(50 - n, p / p.sum())[:n]).astype(np.float32)
            row[0] += 50 - row.sum()
            row /= np.float32(50)
        elif n:
            row = np.sort(row)[::-1]
        weights.append(row)
    entropy = rng.exponential(2, positions).astype(np.float32)
    nll = rng.exponential(3, positions).astype(np.float32)
    nll[-1] = np.nan
    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids=np.concatenate(ids).astype(np.int64),
        weights=np.concatenate(weights).astype(np.float32),
        tail=np.array(tails, np.float32) * (counts > 0),
        method=method,
        temperature=0.7,
        entropy=entropy if extras else None,
        nll=nll if extras else None,
        heads=heads.astype(np.int64) if method == "varopt" else None,
        truth_added=truth,
    )


def by_id(t: SparseTargets) -> SparseTargets:
    """The same targets, each row's entries by rising id."""
    row_E = np.repeat(np.arange(len(t)), t.counts)
    order = np.lexsort((t.ids, row_E))
    return dataclasses.replace(t, ids=t.ids[order], weights=t.weights[order])


def assert_equal_targets(left: SparseTargets, right: SparseTargets) -> None:
    """Equal but for entropy and nll, which the codec rounds."""
    assert (left.method, left.temperature) == (right.method, right.temperature)
    for name in PER_ENTRY + PER_POSITION:
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)
