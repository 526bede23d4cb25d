import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.config.training_rules import default_groups
from megadistill.data.order import Order, rank_rows
from megadistill.errors import ConfigError
from megadistill.storage.counter_rng import permutation


def drawn(rng):
    """An order of random shape, its stores' sizes, and what an epoch draws of each (or None)."""
    stores, groups = int(rng.integers(1, 4)), int(rng.integers(1, 7))
    sizes = rng.integers(1, 40, stores).tolist()
    weights = None
    if rng.random() < 0.6:
        weights = rng.choice([0.25, 0.5, 1, 1.5, 2, 3], stores).tolist()
    total = sum(n * w for n, w in zip(sizes, weights or [1] * stores, strict=True))
    order = Order(
        sizes,
        block_size=rng.integers(1, 10, stores).tolist(),
        # Of any size, but so that a few batches make an epoch.
        global_batch=groups * int(rng.integers(1 + total // (8 * groups), 3 + total // groups)),
        weights=weights,
        seed=int(rng.integers(4)),
        groups=groups,
        shuffle="sequential" if rng.random() < 0.25 else "shuffle",
    )
    return order, sizes, weights


def require_nothing_lost_or_doubled(seed):
    rng = np.random.default_rng(seed)
    order, sizes, weights = drawn(rng)
    mixed = weights is not None and set(weights) != {1.0}
    shares = np.array(sizes) * (weights if mixed else 1)
    shares = shares / shares.sum()
    ends = np.cumsum(sizes)
    seen = np.zeros(ends[-1], np.int64)
    batches = 2 * order.num_sequences // order.global_batch + 2
    for g in range(batches):
        rows = np.array(order.batch(g))
        assert rows.shape == (order.global_batch, 2)
        np.add.at(seen, np.append(0, ends)[rows[:, 0]] + rows[:, 1], 1)
        draws = (g + 1) * order.global_batch
        lines = np.split(seen, ends[:-1]) if mixed else [seen]
        for line, share in zip(lines, shares if mixed else [1.0], strict=True):
            # A line's passes are permutations: each sequence floor(draws / n) times, or once more.
            least, rest = divmod(int(line.sum()), len(line))
            assert line.min() == least
            assert (line == least + 1).sum() == rest
            assert abs(line.sum() - draws * share) < 1 + 1e-9


@pytest.mark.parametrize("part", range(4))
def test_nothing_is_lost_or_doubled(part):
    for seed in range(100 * part, 100 * part + 100):
        require_nothing_lost_or_doubled(seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_nothing_is_lost_or_doubled_in_ten_thousand_cases(part):
    for seed in range(500 * part, 500 * part + 500):
        require_nothing_lost_or_doubled(1_000_000 + seed)


@st.composite
def orders(draw):
    groups = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    return Order(
        sizes,
        block_size=draw(st.integers(1, 9)),
        global_batch=groups * draw(st.integers(1, 5)),
        weights=draw(
            st.none()
            | st.lists(st.sampled_from([0.3, 1, 2]), min_size=len(sizes), max_size=len(sizes))
        ),
        seed=draw(st.integers(0, 3)),
        groups=groups,
        shuffle=draw(st.sampled_from(["shuffle", "shuffle", "sequential"])),
    )


@settings(max_examples=100)
@given(order=orders(), g=st.integers(0, 50))
def test_a_batch_does_not_depend_on_the_batches_asked_for_before(order, g):
    before = [order.batch(k) for k in range(g + 1)]
    assert order.batch(g) == before[g]
    assert order.batch(0) == before[0]


@settings(max_examples=100)
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


RANKS = [d for d in range(1, 97) if 96 % d == 0]


@pytest.mark.parametrize("weights", [None, [1, 3]])
def test_resumed_at_any_rank_count_it_sees_the_same_lists(weights):
    """12 rank counts before, 12 after, 5 points to resume at: 720 equal ordered lists."""
    sizes = [500, 333]

    def lists(ranks, first, last):
        # A run of its own, as a fresh process would have it.
        order = Order(
            sizes, block_size=16, global_batch=96, weights=weights, groups=default_groups(96)
        )
        for step in range(first, last):
            rows = order.batch(step)
            shares = [rank_rows(rows, rank, ranks) for rank in range(ranks)]
            assert {len(share) for share in shares} == {96 // ranks}
            yield [row for share in shares for row in share]

    steps, points = 12, (1, 3, 5, 8, 11)
    expected = list(lists(1, 0, steps))
    begun = {(r, p): list(lists(r, 0, p)) for r in RANKS for p in points}
    resumed = {(r, p): list(lists(r, p, steps)) for r in RANKS for p in points}
    cases = list(itertools.product(RANKS, RANKS, points))
    assert len(cases) == 720
    for before, after, point in cases:
        assert begun[before, point] + resumed[after, point] == expected


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("weights", [None, [1, 1], [2, 0.5]])
def test_resuming_at_every_position_goes_on_as_without_stopping(batch, weights):
    sizes = [200] if weights is None else [120, 80]

    def fresh():
        return Order(sizes, block_size=16, global_batch=batch, weights=weights, groups=batch)

    one, batches = fresh(), 3 * 200 // batch
    undisturbed = [one.batch(g) for g in range(batches)]
    for g in range(batches):
        resumed = fresh()
        assert [resumed.batch(k) for k in range(g, min(g + 3, batches))] == undisturbed[g : g + 3]


def test_a_weight_is_the_passes_over_a_store_in_an_epoch():
    order = Order([30, 20], block_size=4, global_batch=10, weights=[2, 0.5], groups=5)
    assert order.num_sequences == 70
    seen = Counter(row for g in range(14) for row in order.batch(g))
    assert [seen[0, i] for i in range(30)] == [4] * 30
    assert [seen[1, i] for i in range(20)] == [1] * 20


def test_weights_of_one_are_no_weights():
    plain, weighted = (
        Order([30, 20], block_size=4, global_batch=10, groups=5, weights=w) for w in (None, [1, 1])
    )
    assert [plain.batch(g) for g in range(9)] == [weighted.batch(g) for g in range(9)]


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
    with pytest.raises(ConfigError, match=r"groups: 64 .*global_batch \(48\), .* to 48"):
        Order([10], block_size=4, global_batch=48)


def test_a_permutation_is_one():
    for length in (0, 1, 2, 1000):
        assert np.array_equal(np.sort(permutation(length, 5)), np.arange(length))


def test_groups_that_do_not_divide_the_batch_are_refused_as_by_the_configuration():
    with pytest.raises(ConfigError, match=r"order\.groups: 5 does not divide train\.global_batch"):
        Order([64], block_size=16, global_batch=64, groups=5)
    Order([64], block_size=16, global_batch=64, groups=5, shuffle="sequential")
