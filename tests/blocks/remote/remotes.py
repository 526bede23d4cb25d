"""What tests of remote stores hold and compare."""

from __future__ import annotations

from tests.blocks.stores import BLOCK_SIZE, make_samples, same_sample

SAMPLES = make_samples(10 * BLOCK_SIZE - 1)


def shards(local) -> list[str]:
    return sorted(p.name for p in local.path.glob("*/shard.*.mds"))


def require_same(store, samples=SAMPLES) -> None:
    assert len(store) == len(samples)
    assert all(same_sample(store[i], samples[i]) for i in range(len(samples)))
