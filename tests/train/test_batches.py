"""Reading ahead: the order's sequences, from several stores, near or far, errors at their step."""

import fsspec
import numpy as np
import pytest

from megadistill.blocks import open_store
from megadistill.blocks.remote.shard_cache import LocalCopies
from megadistill.blocks.remote.upload import copy_store
from megadistill.data.order import Order
from megadistill.errors import CorruptBlockError
from megadistill.train.batches import Batches
from megadistill.train.training_source import open_sequences
from tests.train.stores import make_store


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return [make_store(folder / "a", sequences=44), make_store(folder / "b", sequences=23, seed=5)]


def opened(paths, **options):
    return [open_sequences(p, key="cache.dir", with_targets=True, **options) for p in paths]


def order_of(stores, *, batch=12, weights=None):
    return Order(
        [len(s) for s in stores],
        block_size=[s.store.block_size for s in stores],
        weights=weights,
        global_batch=batch,
        groups=4,
    )


def batches_of(stores, order, *, first=0, last=12, rank=0, world=1, micro_batch=2):
    return Batches(
        stores,
        order,
        rank=rank,
        world=world,
        micro_batch=micro_batch,
        with_targets=True,
        first=first,
        last=last,
    )


@pytest.mark.parametrize("weights", [None, [1, 2]])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_read_the_sequences_of_the_order(folders, weights, world):
    stores = opened(folders)
    order = order_of(stores, weights=weights)
    read = []
    for rank in range(world):
        with batches_of(stores, order, rank=rank, world=world) as batches:
            read.append([next(batches) for _ in range(12)])
    for step in range(12):
        rows = [(b, i) for share in read for b in share[step] for i in range(len(b.names))]
        assert [b.names[i] for b, i in rows] == order.batch(step)
        for b, i in rows:
            store, sequence = b.names[i]
            expected = stores[store][sequence]
            assert np.array_equal(b.tokens_BT[i], expected["tokens"])
            found = b.targets.rows(i * len(expected["tokens"]), (i + 1) * len(expected["tokens"]))
            assert np.array_equal(found.ids, expected["targets"].ids)


@pytest.mark.parametrize("weights", [None, [2, 0.5]])
def test_resumed_at_any_step_it_reads_what_it_would_have_read(folders, weights):
    stores = opened(folders)
    order = order_of(stores, weights=weights, batch=4)
    with batches_of(stores, order, last=40) as batches:
        undisturbed = [[(b.names, b.tokens_BT.tobytes()) for b in share] for share in batches]
    assert len(undisturbed) == 40
    for first in range(40):
        with batches_of(
            stores, order_of(stores, weights=weights, batch=4), first=first, last=40
        ) as batches:
            assert [(b.names, b.tokens_BT.tobytes()) for b in next(batches)] == undisturbed[first]


def test_a_damaged_sequence_is_told_at_its_step_and_not_before(tmp_path):
    path = make_store(tmp_path / "cache", sequences=40)
    stores = opened([path])
    shard = open_store(path).layout.shard(3)
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    order = Order([40], block_size=8, global_batch=8, shuffle="sequential")
    with batches_of(stores, order, last=5) as batches:
        for _ in range(3):
            next(batches)
        with pytest.raises(CorruptBlockError, match=r"shard.000003.mds"):
            next(batches)


@pytest.fixture
def remote(folders, tmp_path):
    """The stores, copied to memory, and a folder for local copies of their shards."""
    fsspec.filesystem("memory").store.clear()
    for name, path in zip("ab", folders, strict=True):
        copy_store(path, f"memory://far/{name}")
    return ["memory://far/a", "memory://far/b"], LocalCopies(tmp_path / "local")


def test_shards_of_remote_stores_are_downloaded_before_a_step_needs_them(folders, remote):
    urls, local = remote
    near, far = opened(folders), opened(urls, local=local)
    order = order_of(near, weights=[1, 2])
    with batches_of(near, order) as expected, batches_of(far, order) as batches:
        assert next(batches)[0].names == next(expected)[0].names
        batches._fetchers.shutdown()
        needed = {(k, i // 8) for step in range(12) for k, i in order.batch(step)}
        kept = {
            (k, b)
            for k, s in enumerate(far)
            for b in s.store.committed()
            if s.store.layout.shard(b).exists()
        }
        assert needed <= kept
    with batches_of(near, order) as expected, batches_of(far, order) as batches:
        for near_share, far_share in zip(expected, batches, strict=True):
            for a, b in zip(near_share, far_share, strict=True):
                assert np.array_equal(a.tokens_BT, b.tokens_BT)


def test_an_object_that_vanished_is_told_at_its_step(remote):
    urls, local = remote
    stores = opened(urls[:1], local=local)
    fsspec.filesystem("memory").rm_file("/far/a/shard.000002.mds")
    order = Order([44], block_size=8, global_batch=8, shuffle="sequential")
    with batches_of(stores, order, last=5) as batches:
        next(batches)
        next(batches)
        with pytest.raises(CorruptBlockError, match=r"far/a/shard.000002.mds: .* found no file"):
            next(batches)
