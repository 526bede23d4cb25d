"""Select: unbiased, exact where it claims to be, the same on every slicing of the vocabulary."""

import numpy as np
import pytest
import torch

from megadistill.errors import TeacherError
from megadistill.targets import concatenate
from megadistill.teacher.distributions import VocabularySlice
from megadistill.teacher.select import select_targets
from megadistill.teacher.starts import SELECT, below, uniform
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


def sliced(mesh, method: str, vocab: int):
    log_probs, labels = peaked(64, vocab), torch.arange(64) % vocab
    first, last = vocab * mesh.tp_rank // mesh.tp, vocab * (mesh.tp_rank + 1) // mesh.tp
    targets = select_targets(
        log_probs[:, first:last].contiguous(), method=method, tau=0.03, k=20, keys_N=keys(64),
        labels_N=labels, vocabulary=VocabularySlice(first, last - first, mesh.tp_group),
    )  # fmt: skip
    return targets.numpy()


@pytest.mark.parametrize("method", ["varopt", "topk"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_slicing_of_the_vocabulary_gives_the_same_targets(method, ranks):
    vocab = 1003  # no multiple of ranks
    whole = select_targets(
        peaked(64, vocab), method=method, tau=0.03, k=20, keys_N=keys(64),
        labels_N=torch.arange(64) % vocab,
    ).numpy()  # fmt: skip
    for targets in run_ranks(
        ranks, "tests.teacher.test_select:sliced", tp=ranks, method=method, vocab=vocab
    ):
        for name in ("offsets", "ids", "weights", "tail", "nll"):
            np.testing.assert_array_equal(getattr(targets, name), getattr(whole, name), name)
        np.testing.assert_allclose(targets.entropy, whole.entropy, rtol=1e-5)


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
