"""Local copies of remote caches: `cache.local_dir` has them, `cache.local_limit` bounds them."""

from megadistill.blocks import open_store
from megadistill.blocks.remote.upload import copy_store
from megadistill.train.training_source import local_copies
from tests.blocks.stores import BLOCK_SIZE, fill, make_samples, same_sample
from tests.train.stores import make_config


def test_copies_of_a_remote_store_stay_below_the_limit(tmp_path):
    samples = make_samples(8 * BLOCK_SIZE)
    source = fill(tmp_path / "source", samples)
    largest = max(path.stat().st_size for path in source.path.glob("shard.*.mds"))
    copy_store(source.path, f"file://{tmp_path}/remote")
    keys = {"local_dir": str(tmp_path / "local"), "local_limit": 3.5 * largest / 2**30}
    copies = local_copies(make_config(tmp_path, cache=keys).cache)
    assert copies.limit == int(3.5 * largest)
    store = open_store(f"file://{tmp_path}/remote", local=copies)
    for number, sample in enumerate(samples):
        assert same_sample(store[number], sample)
        there = [path.stat().st_size for path in (tmp_path / "local").glob("*/shard.*.mds")]
        assert 0 < sum(there) <= 3.5 * largest
    assert len(there) == 3  # as many as fit


def test_the_limit_counts_in_gib(tmp_path):
    assert local_copies(make_config(tmp_path, cache={"local_limit": 2}).cache).limit == 2 * 2**30
