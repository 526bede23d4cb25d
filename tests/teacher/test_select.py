"""Select: unbiased, exact where it claims to be, the same on every slicing of the vocabulary."""

import numpy as np
import pytest
import torch

from megadistill.errors import TeacherError
from megadistill.storage.counter_rng import SELECT, below, uniform, uniforms
from megadistill.targets import concatenate
from megadistill.targets.distributions import VocabularySlice
from megadistill.teacher.select import select_targets
from tests.cache.targets import METHODS
from tests.ranks import run_ranks


def peaked(n: int, vocab: int, seed: int = 0, temperature: float = 0.6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = -torch.log(torch.arange(vocab) + 2.7) + 3 * torch.randn(n, vocab, generator=generator)
    return torch.log_softmax(logits / temperature, dim=1)


def keys(n: int, sequence: int = 0) -> torch.Tensor:
    return torch.stack([torch.full((n,), sequence), torch.arange(n)], 1)


def test_varopt_weights_sum_to_one_and_no_id_stands_twice():
    targets = select_targets(peaked(300, 1000), method="varopt", tau=0.05, keys_N=keys(300))
    ids, weights = targets.padded()
    assert (weights.sum(1) - 1).abs().max() < 1e-6
    for row in range(300):
        first, last = targets.offsets[row], targets.offsets[row + 1]
        assert len(set(targets.ids[first:last].tolist())) == last - first
    assert int(ids.max()) < 1000


def test_varopt_keeps_every_id_above_tau_and_always_the_most_probable_one_exactly():
    log_probs = peaked(200, 500)
    targets = select_targets(log_probs, method="varopt", tau=0.05, keys_N=keys(200))
    for row in range(200):
        probs = log_probs[row].exp()
        first, heads = int(targets.offsets[row]), int(targets.heads[row])
        kept = targets.ids[first : first + heads]
        assert int(probs.argmax()) == int(kept[0])
        assert set((probs >= 0.05).nonzero()[:, 0].tolist()) <= set(kept.tolist())
        assert torch.allclose(targets.weights[first : first + heads], probs[kept], atol=1e-6)


def test_varopt_weights_are_unbiased():
    draws, vocab = 20_000, 60
    log_probs = peaked(1, vocab, seed=3, temperature=2.0)
    targets = select_targets(
        log_probs.expand(draws, vocab).contiguous(), method="varopt", tau=0.2, keys_N=keys(draws)
    )
    mean = np.bincount(targets.ids.numpy(), targets.weights.numpy(), minlength=vocab) / draws
    probs = log_probs[0].exp().double().numpy()
    # An id is either a head (no variance) or drawn with weight r/m: a scaled Bernoulli.
    step = float(targets.weights[-1])
    error = np.sqrt(probs * np.maximum(step - probs, 0) / draws)
    drawn = (probs < 0.99 * step) & (probs * draws / step > 25)
    assert drawn.sum() > 10
    assert (np.abs(mean - probs)[drawn] / error[drawn]).max() < 4.5
    assert np.abs(mean - probs)[probs > step].max() < 1e-6


def test_a_start_is_uniform_and_differs_by_seed_purpose_sequence_and_position():
    limit = torch.full((50_000,), 10)
    values = below(limit, uniform(keys(50_000), seed=1, purpose=SELECT))
    counts = np.bincount(values.numpy(), minlength=10)
    assert ((counts - 5000) ** 2 / 5000).sum() < 35  # chi-squared, 9 degrees of freedom
    starts = [
        uniform(keys(100, sequence), seed=seed, purpose=purpose)
        for sequence in (0, 1)
        for seed in (0, 1)
        for purpose in (1, 2)
    ]
    assert len(set(torch.cat(starts).tolist())) == 800


def test_topk_lists_the_most_probable_the_tail_and_the_truth():
    log_probs = peaked(100, 300)
    labels = torch.randint(0, 300, (100,), generator=torch.Generator().manual_seed(1))
    targets = select_targets(log_probs, method="topk", k=8, keys_N=keys(100), labels_N=labels)
    best = log_probs.topk(8)
    for row in range(100):
        first, last = int(targets.offsets[row]), int(targets.offsets[row + 1])
        assert targets.ids[first : first + 8].tolist() == best.indices[row].tolist()
        added = bool(targets.truth_added[row])
        assert added == (int(labels[row]) not in best.indices[row].tolist())
        assert last - first == 8 + added
        if added:
            assert int(targets.ids[last - 1]) == int(labels[row])
        listed = float(targets.weights[first:last].sum())
        assert abs(listed + float(targets.tail[row]) - 1) < 1e-5
    assert torch.allclose(targets.nll, -log_probs.gather(1, labels[:, None])[:, 0])
    entropy = -(log_probs.exp() * log_probs).sum(1)
    assert torch.allclose(targets.entropy, entropy, atol=1e-5)


def test_ties_go_to_the_lower_id():
    flat = torch.full((3, 40), -np.log(40.0), dtype=torch.float32)
    targets = select_targets(flat, method="topk", k=5, keys_N=keys(3))
    assert targets.ids.view(3, 5).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_a_position_without_a_label_gets_an_empty_row():
    labels = torch.tensor([3, -100, 5, -100])
    targets = select_targets(
        peaked(4, 50), method="varopt", tau=0.1, keys_N=keys(4), labels_N=labels
    )
    assert (targets.counts > 0).tolist() == [True, False, True, False]
    assert torch.isnan(targets.nll).tolist() == [False, True, False, True]


def test_a_value_that_is_not_finite_stops_with_the_sequence_named():
    log_probs = peaked(4, 50)
    log_probs[2, 7] = float("nan")
    with pytest.raises(TeacherError, match="sequence 9, position 2"):
        select_targets(log_probs, method="topk", k=4, keys_N=keys(4, sequence=9))


NAMES = ("offsets", "ids", "weights", "tail", "entropy", "nll", "heads", "truth_added", "rounding")


def ragged_labels(n: int, vocab: int) -> torch.Tensor:
    labels = torch.arange(n) * 7 % vocab
    labels[::9] = -100
    return labels


def with_ties(vocab: int) -> torch.Tensor:
    """Rows whose values repeat, within a block of 64 ids and across them."""
    rows = peaked(64, vocab)
    rows[::2] = torch.log_softmax(rows[::2].mul(2).round().div(2), 1)
    return rows


def sliced(mesh, method: str, vocab: int, **more):
    first, last = vocab * mesh.tp_rank // mesh.tp, vocab * (mesh.tp_rank + 1) // mesh.tp
    targets = select_targets(
        with_ties(vocab)[:, first:last].contiguous(),
        method=method,
        keys_N=keys(64),
        labels_N=ragged_labels(64, vocab),
        vocabulary=VocabularySlice(first, last - first, mesh.tp_group),
        **more,
    )
    return targets.numpy()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("vocab", "more"),
    [
        (1003, {"tau": 0.03, "k": 20, "draws": 30}),  # no multiple of ranks
        (30_001, {"tau": 0.2, "k": 20, "p": 0.6}),  # slices larger than what is looked at closely
        (50, {"k": 40, "min_entropy": 1.0}),  # slices with fewer ids than are kept
    ],
)
def test_every_slicing_of_the_vocabulary_gives_the_same_targets(method, ranks, vocab, more):
    whole = select_targets(
        with_ties(vocab), method=method, keys_N=keys(64), labels_N=ragged_labels(64, vocab), **more
    ).numpy()
    for targets in run_ranks(
        ranks, "tests.teacher.test_select:sliced", tp=ranks, method=method, vocab=vocab, **more
    ):
        for name in NAMES:
            np.testing.assert_array_equal(getattr(targets, name), getattr(whole, name), name)


def naive_list(log_probs: np.ndarray, *, k: int, p: float | None, truth: int) -> list[int]:
    """The ids of topk or topp, by their definition, the added truth last."""
    order = sorted(range(len(log_probs)), key=lambda v: (-log_probs[v], v))[:k]
    probs = np.exp(log_probs.astype(np.float64))
    if p is not None:
        mass = np.cumsum(probs[order]) / probs.sum()
        order = order[: int(np.argmax(mass >= p)) + 1] if (mass >= p).any() else order
    return order if truth in order else [*order, truth]


@pytest.mark.parametrize("vocab", [40, 64, 700, 9000])
@pytest.mark.parametrize(("method", "p"), [("topk", None), ("topp", 0.9), ("topp", 0.3)])
def test_lists_are_what_their_definition_says(vocab, method, p):
    log_probs, labels = with_ties(vocab), torch.arange(64) * 5 % vocab
    parameters = {} if p is None else {"p": p}
    targets = select_targets(
        log_probs, method=method, k=12, keys_N=keys(64), labels_N=labels, **parameters
    )
    for n in range(64):
        row = targets.rows(n, n + 1)
        expected = naive_list(log_probs[n].numpy(), k=12, p=p, truth=int(labels[n]))
        assert row.ids.tolist() == expected
        probs = log_probs[n].exp().double()
        assert torch.allclose(row.weights.double(), probs[expected], rtol=1e-6)
        listed = float(probs[expected].sum() / probs.sum())  # float32 log-probs sum to 1 nearly
        assert float(row.tail) == pytest.approx(1 - listed, abs=1e-6)
        best = naive_list(log_probs[n].numpy(), k=12, p=p, truth=expected[0])
        assert bool(row.truth_added) == (expected != best)


def test_without_labels_no_truth_is_added_and_there_is_no_nll():
    targets = select_targets(peaked(5, 90), method="topp", p=0.5, keys_N=keys(5))
    assert not targets.truth_added.any()
    assert targets.nll is None


def test_multinomial_counts_its_draws_most_drawn_first_then_the_lower_id():
    targets = select_targets(
        peaked(300, 1000), method="multinomial", draws=30, keys_N=keys(300), entropy=False
    )
    assert targets.entropy is None
    assert targets.rounding is None
    assert (targets.tail == 0).all()
    for n in range(300):
        row = targets.rows(n, n + 1)
        counts = (row.weights.double() * 30).round().long().tolist()
        assert sum(counts) == 30
        assert torch.equal(row.weights, (torch.tensor(counts).double() / 30).float())
        pairs = list(zip([-c for c in counts], row.ids.tolist(), strict=True))
        assert pairs == sorted(set(pairs))
        assert len(set(row.ids.tolist())) == len(pairs)


def test_more_draws_than_ids_and_a_single_draw_are_draws_too():
    flat = torch.full((20, 6), -np.log(6.0), dtype=torch.float32)
    many = select_targets(flat, method="multinomial", draws=5000, keys_N=keys(20))
    assert many.counts.tolist() == [6] * 20
    assert (many.weights - 1 / 6).abs().max() < 0.04
    one = select_targets(flat, method="multinomial", draws=1, keys_N=keys(20))
    assert one.weights.tolist() == [1.0] * 20


@pytest.mark.parametrize("method", METHODS)
def test_positions_below_the_entropy_threshold_get_an_empty_row(method):
    log_probs = peaked(200, 500)
    labels = ragged_labels(200, 500)
    whole = select_targets(log_probs, method=method, keys_N=keys(200), labels_N=labels)
    threshold = float(whole.entropy.nanmedian())
    some = select_targets(
        log_probs, method=method, keys_N=keys(200), labels_N=labels, min_entropy=threshold
    )
    kept = whole.entropy >= threshold
    assert 0 < int(kept.sum()) < int((labels != -100).sum())
    assert torch.equal(some.counts > 0, kept)
    assert torch.equal(some.counts[kept], whole.counts[kept])
    assert torch.equal(some.entropy[kept], whole.entropy[kept])
    assert some.entropy[~kept].isnan().all()
    assert some.nll[~kept].isnan().all()
    for n in kept.nonzero()[:, 0].tolist():
        assert torch.equal(some.rows(n, n + 1).ids, whole.rows(n, n + 1).ids)
    none = select_targets(log_probs, method=method, keys_N=keys(200), min_entropy=99.0)
    assert len(none) == 200
    assert int(none.offsets[-1]) == 0


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"method": "top"}, "method is 'top', expected one of varopt, multinomial, topk, topp"),
        ({"method": "varopt", "tau": 0.0}, "tau is 0.0, expected more than 0 and at most 1"),
        ({"method": "varopt", "tau": float("nan")}, "tau is nan"),
        ({"method": "multinomial", "draws": 0}, "draws is 0, expected more than 0"),
        ({"method": "topk", "k": -1}, "k is -1, expected more than 0"),
        ({"method": "topp", "p": 1.5}, "p is 1.5, expected more than 0 and at most 1"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(parameters, said):
    with pytest.raises(ValueError, match=said):
        select_targets(peaked(2, 10), keys_N=keys(2), **parameters)


def test_starts_are_the_same_in_numpy_and_in_torch_and_differ_by_draw():
    found = uniforms(keys(50), torch.arange(20), seed=-3, purpose=SELECT)
    again = uniforms(keys(50).numpy(), np.arange(20), seed=-3, purpose=SELECT)
    np.testing.assert_array_equal(found.numpy(), again)
    assert len(np.unique(again)) == 1000


def test_varopt_gives_every_position_a_number_of_its_own_to_round_with():
    labels = torch.arange(200) % 50
    labels[::5] = -100
    targets = select_targets(
        peaked(200, 50), method="varopt", tau=0.1, keys_N=keys(200), labels_N=labels
    )
    kept = targets.rounding[labels != -100]
    assert len(set(kept.tolist())) == 160
    assert int(kept.min()) >= 0
    assert 2**31 < int(kept.max()) < 2**32
    halves = concatenate([targets.rows(0, 70), targets.rows(70, 200)]).numpy()
    np.testing.assert_array_equal(halves.rounding, targets.rounding)
    starts = uniform(keys(200), seed=0, purpose=SELECT) >> 12
    assert not set(starts.tolist()) & set(kept.tolist())
