"""One batch in any number of passes, on any number of ranks, is one step."""

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.train.stores import make_config, make_store
from tests.train.test_loop import RUN, elsewhere, series

STEPS = 50


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Fifty steps of 8 completions, of 1 to 15 tokens, in one pass of one rank."""
    folder = tmp_path_factory.mktemp("batch")
    make_store(folder / "cache", seed=1, sequences=64, masked=True)
    train = {"steps": STEPS, "global_batch": 8, "micro_batch": 8, "lr": 1e-3, "warmup_steps": 5}
    config = make_config(folder, train=train)
    run_ranks(1, RUN, config=config)
    return config


def test_the_completions_are_of_very_different_lengths(whole):
    from megadistill.cache.reader import open_cache

    lengths = [int(sample["loss_mask"].sum()) for sample in open_cache(whole.cache.dir)]
    assert min(lengths) <= 2
    assert max(lengths) >= 13


@pytest.mark.parametrize(
    ("world", "micro_batch"),
    [
        pytest.param(1, 4, marks=pytest.mark.long),
        pytest.param(1, 1, marks=pytest.mark.long),
        pytest.param(2, 4, marks=pytest.mark.long),
        (2, 1),
    ],
)
def test_a_batch_in_several_passes_is_the_batch_in_one(whole, world, micro_batch):
    config = elsewhere(whole, f"{world}x{micro_batch}", micro_batch=micro_batch)
    run_ranks(world, RUN, config=config)
    ours, theirs = (np.array(series(c)) for c in (config, whole))
    apart = np.abs(ours - theirs)[:, 0]
    assert apart.max() <= 1e-5
    assert apart.mean() <= 1e-6
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
