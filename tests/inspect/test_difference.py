"""Comparing stores: blocks of equal length are not equal blocks."""

from megadistill.cache.writer import CacheWriter
from megadistill.inspect.difference import diff_stores
from tests.cache.caches import BLOCK_SIZE, block_of, create_cache, fill_cache


def test_a_block_with_other_targets_is_different_and_its_first_position_is_named(tmp_path):
    left = fill_cache(tmp_path / "left", total=12)
    right = create_cache(tmp_path / "right")
    right.plan(12)
    with CacheWriter(right, made_with={"torch": "2.13.0"}) as writer:
        for block in range(3):
            samples, targets = block_of(block, total=12)
            if block == 1:
                targets = [targets[1], targets[0], *targets[2:]]
            writer.submit(block, samples, targets)
    right.finish()
    facts = diff_stores(left.path, right.path)
    assert not facts["equal"]
    assert facts["different_blocks"] == [1]
    assert (facts["blocks_in_both"], facts["only_left"], facts["only_right"]) == (3, [], [])
    assert (facts["first"]["block"], facts["first"]["sequence"]) == (1, BLOCK_SIZE)


def test_a_cache_is_equal_to_itself(tmp_path):
    cache = fill_cache(tmp_path / "cache", total=12)
    assert diff_stores(cache.path, cache.path)["equal"]
