from fractions import Fraction

import numpy as np
import pytest

from megadistill.data.mixture import PERIOD, Mixture


@pytest.mark.parametrize("seed", range(200))
def test_every_source_is_within_one_draw_of_its_share_after_any_number_of_draws(seed):
    rng = np.random.default_rng(seed)
    sources = int(rng.integers(1, 9))
    amounts = [Fraction(int(n)) for n in rng.integers(1, (7, 60, 2000)[seed % 3], sources)]
    mixture = Mixture(amounts)
    source, turn = mixture.draws(np.arange(2 * mixture.period))
    counts = np.cumsum(source[:, None] == np.arange(sources), 0)
    draws = np.arange(1, len(source) + 1)[:, None]
    # In whole numbers: |count - draws * amount / total| < 1.
    whole, total = np.array([int(a) for a in amounts]), int(sum(amounts))
    assert (np.abs(counts * total - draws * whole) < total).all()
    assert np.array_equal(counts[np.arange(len(source)), source] - 1, turn)


def test_any_position_is_known_without_those_before_it():
    mixture = Mixture([Fraction(10), Fraction("3.5"), Fraction(1)])
    source, turn = mixture.draws(np.arange(1000))
    far = 10**12 * mixture.period
    later, later_turn = mixture.draws(far + np.arange(1000))
    assert np.array_equal(later, source)
    assert np.array_equal(later_turn - turn, 10**12 * mixture.counts[source])


def test_shares_without_a_short_period_are_rounded_and_none_to_nothing():
    mixture = Mixture([Fraction(10**9), Fraction(10**8 + 1), Fraction(7)])
    assert mixture.period <= PERIOD
    assert mixture.counts.min() == 1
    share = mixture.counts / mixture.period
    assert (
        np.abs(share - np.array([10**9, 10**8 + 1, 7]) / (10**9 + 10**8 + 8)).max() < 1 / PERIOD * 2
    )


def test_the_interleaving_is_written_down():
    """It decides what resumed runs see."""
    source, turn = Mixture([Fraction(3), Fraction(2), Fraction(1)]).draws(np.arange(8))
    assert source.tolist() == [0, 1, 0, 1, 0, 2, 0, 1]
    assert turn.tolist() == [0, 0, 1, 1, 2, 0, 3, 2]
