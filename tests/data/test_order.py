from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.data.hashing import permutation
from megadistill.data.order import Order
from megadistill.errors import ConfigError


@st.composite
def orders(draw):
    groups = draw(st.integers(1, 6))
    return Order(
        draw(st.lists(st.integers(1, 70), min_size=1, max_size=3)),
        block_size=draw(st.integers(1, 9)),
        global_batch=groups * draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 3)),
        groups=groups,
        shuffle=draw(st.sampled_from(["shuffle", "shuffle", "sequential"])),
    )


@settings(max_examples=200, deadline=None)
@given(order=orders(), start=st.integers(0, 5))
def test_nothing_is_lost_or_doubled_in_an_epoch(order, start):
    seen = Counter()
    for g in range(3 * order.num_sequences // order.global_batch + 2):
        batch = order.batch(g)
        assert len(batch) == order.global_batch
        seen.update(batch)
        # After p sequences each was seen floor(p / n) times, or once more.
        least, _ = divmod((g + 1) * order.global_batch, order.num_sequences)
        assert set(seen.values()) <= {least, least + 1}
        assert least == 0 or len(seen) == order.num_sequences


@settings(max_examples=100, deadline=None)
@given(order=orders(), g=st.integers(0, 50))
def test_a_batch_does_not_depend_on_the_batches_asked_for_before(order, g):
    before = [order.batch(k) for k in range(g + 1)]
    assert order.batch(g) == before[g]
    assert order.batch(0) == before[0]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=2),
    hosts=st.sampled_from([2, 4]),
    block_size=st.integers(1, 16),
)
def test_over_all_hosts_hardly_more_than_the_store_is_read_in_an_epoch(sizes, hosts, block_size):
    order = Order(sizes, block_size=block_size, global_batch=16, groups=8)
    blocks = sum(-(-size // block_size) for size in sizes)
    read = [set() for _ in range(hosts)]
    for g in range(order.num_sequences // order.global_batch):
        batch = order.batch(g)
        for host in range(hosts):
            rows = batch[host * 16 // hosts : (host + 1) * 16 // hosts]
            read[host] |= {(store, at // block_size) for store, at in rows}
    # At most the blocks that lie across a cut between two hosts are read twice.
    assert sum(map(len, read)) <= blocks + hosts - 1


def test_every_epoch_has_an_order_of_its_own():
    order = Order([64], block_size=4, global_batch=64, groups=4)
    first, second = order.batch(0), order.batch(1)
    assert sorted(first) == sorted(second)
    assert first != second
    assert order.batch(0) != Order([64], block_size=4, global_batch=64, groups=4, seed=1).batch(0)


def test_sequential_order_is_the_stores_own():
    order = Order([5, 3], block_size=2, global_batch=6, shuffle="sequential")
    assert order.batch(0) == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]
    assert order.batch(1) == [(1, 1), (1, 2), (0, 0), (0, 1), (0, 2), (0, 3)]


def test_a_batch_mixes_the_whole_store():
    order = Order([64 * 256], block_size=256, global_batch=64, groups=64)
    blocks = {at // 256 for _, at in order.batch(3)}
    assert len(blocks) == 64


def test_the_order_is_written_down():
    """Orders are a contract: a change here changes what resumed runs see."""
    order = Order([10], block_size=4, global_batch=4, groups=2, seed=7)
    assert [at for g in range(3) for _, at in order.batch(g)] == [
        8,
        1,
        6,
        5,
        0,
        3,
        7,
        9,
        2,
        3,
        4,
        7,
    ]
    assert permutation(8, 1, 2, -3).tolist() == [3, 6, 4, 0, 2, 5, 7, 1]


def test_groups_that_do_not_divide_the_batch_are_refused_with_one_that_does():
    with pytest.raises(ConfigError, match=r"groups: 64 .*global_batch 48: .* to 48"):
        Order([10], block_size=4, global_batch=48)


def test_a_permutation_is_one():
    for length in (0, 1, 2, 1000):
        assert np.array_equal(np.sort(permutation(length, 5)), np.arange(length))
