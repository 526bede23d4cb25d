"""Whole distributions, and unions of what both sides find probable, against a dense reference."""

import dataclasses

import pytest
import torch

from megadistill.errors import ConfigError
from megadistill.student.head import distillation_terms
from megadistill.targets import SparseTargets
from megadistill.targets.dense import DenseTargets
from megadistill.targets.distributions import VocabularySlice
from megadistill.targets.divergence_registry import DIVERGENCES
from megadistill.teacher.chunked_head import TeacherHead
from tests.student.loss.reference import dense_terms

N, H, V, TEACHER_H = 11, 8, 53, 12


def case(*, seed=0, vocab=V, teacher_vocab=V, k=None, scale=1.0, dtype=torch.float32):
    """(hidden, weight, targets, labels): a student's and a teacher's head over random states."""
    g = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(N, H, generator=g).to(dtype).requires_grad_()
    weight_VH = (scale * torch.randn(vocab, H, generator=g)).to(dtype).requires_grad_()
    head = TeacherHead(
        scale * torch.randn(teacher_vocab, TEACHER_H, generator=g),
        VocabularySlice(0, teacher_vocab),
        softcap=20.0,
        chunk_bytes=4 * teacher_vocab * 3,
    )
    targets = DenseTargets(torch.randn(N, TEACHER_H, generator=g), head, k)
    labels_N = torch.randint(0, teacher_vocab, (N,), generator=g)
    labels_N[[2, 7]] = -100
    return hidden_NH, weight_VH, targets, labels_N


def log_probs(targets, temperature=1.0):
    out_NV = torch.empty(len(targets), targets.vocab_size)
    return targets.log_probs(temperature=temperature, out_CV=out_NV).double()


def listed(log_p_NV, ids_of_row, temperature):
    """SparseTargets that list the given ids of each row, the most probable first."""
    p_NV = log_p_NV.exp()
    ids_of_row = [
        sorted(ids, key=lambda i, n=n: -p_NV[n, i].item()) for n, ids in enumerate(ids_of_row)
    ]
    counts = torch.tensor([len(ids) for ids in ids_of_row])
    ids = torch.cat([torch.tensor(ids) for ids in ids_of_row])
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    mask_NV = torch.zeros_like(p_NV, dtype=torch.bool)
    mask_NV[rows, ids] = True
    return SparseTargets(
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        ids=ids,
        weights=p_NV[rows, ids],
        tail=p_NV.masked_fill(mask_NV, 0).sum(1),
        method="topk",
        temperature=temperature,
    )


def unions(z_NV, log_p_NV, k):
    """What a person would list: the best of both, in a set."""
    best = [side.topk(k, 1).indices.tolist() for side in (z_NV, log_p_NV)]
    return [sorted({*ours, *theirs}) for ours, theirs in zip(*best, strict=True)]


def check(
    targets, reference, hidden_NH, weight_VH, labels_N, *, vocab_size=None, mode=None, **options
):
    terms = distillation_terms(
        hidden_NH,
        weight_VH,
        targets,
        labels_N,
        chunk_size=4,
        agreement=True,
        mode=mode,
        vocab_size=vocab_size,
        **options,
    )
    grads = torch.autograd.grad(terms.loss, [hidden_NH, weight_VH])
    expected, kd_sum, ce_sum = dense_terms(
        hidden_NH, weight_VH, reference, labels_N, vocab_size=vocab_size, **options
    )
    expected_grads = torch.autograd.grad(expected, [hidden_NH, weight_VH])
    close = {"rtol": 5e-4, "atol": 1e-5}
    torch.testing.assert_close(terms.loss.double(), expected.double(), **close)
    torch.testing.assert_close(terms.kd_sum, kd_sum, **close)
    torch.testing.assert_close(terms.ce_sum, ce_sum, **close)
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), **close)
    assert terms.kd_count == terms.ce_count == N - 2
    assert terms.kd_sum >= 0
    return terms


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES.names())
def test_a_whole_distribution_is_what_listing_every_id_is(divergence, temperature, mode):
    hidden_NH, weight_VH, targets, labels_N = case(seed=1)
    log_p_NV = log_probs(targets, temperature)
    every = listed(log_p_NV, [list(range(V))] * N, temperature)
    terms = check(
        targets,
        every,
        hidden_NH,
        weight_VH,
        labels_N,
        divergence=divergence,
        temperature=temperature,
        ce_weight=0.3,
        label_smoothing=0.1,
        z_loss=0.01,
        mode=mode,
    )
    z_NV = hidden_NH @ weight_VH.T
    same = (z_NV.argmax(1) == log_p_NV.argmax(1))[labels_N != -100]
    assert terms.agreed == same.sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 40, V])
@pytest.mark.parametrize("divergence", DIVERGENCES.names())
def test_a_union_is_what_listing_its_ids_is(divergence, k, temperature):
    hidden_NH, weight_VH, targets, labels_N = case(seed=2, k=k)
    log_p_NV = log_probs(targets, temperature)
    ids = unions((hidden_NH @ weight_VH.T).detach(), log_p_NV, k)
    check(
        targets,
        listed(log_p_NV, ids, temperature),
        hidden_NH,
        weight_VH,
        labels_N,
        divergence=divergence,
        temperature=temperature,
        ce_weight=0.5,
    )


def test_no_id_is_in_a_union_twice_and_its_weights_are_the_teachers():
    from megadistill.student.loss.dense_divergence import union_entries

    hidden_NH, weight_VH, targets, _ = case(seed=3)
    log_p_NV = log_probs(targets).float()
    # A student that agrees with the teacher on most: the two lists overlap.
    z_NV = log_p_NV + 0.3 * (hidden_NH @ weight_VH.T).detach()
    expected = unions(z_NV, log_p_NV, 6)
    entries = union_entries(z_NV.clone(), log_p_NV.clone(), 6)
    assert [entries.id_E[entries.row_E == n].tolist() for n in range(N)] == expected
    assert any(len(row) < 12 for row in expected)
    assert entries.listed_C.tolist() == [len(row) for row in expected]
    p_NV = log_p_NV.exp()
    torch.testing.assert_close(entries.weight_E, p_NV[entries.row_E, entries.id_E])
    torch.testing.assert_close(entries.sum(entries.weight_E) + entries.tail_C, torch.ones(N))


@pytest.mark.parametrize("vocab", [640, 1000, 1023])
def test_the_best_of_a_long_row_are_found_in_its_blocks_and_in_what_is_left_over(vocab):
    from megadistill.student.loss.dense_divergence import _best

    values_CV = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab))
    values_CV[0, -1], values_CV[1, 0], values_CV[2] = 99.0, 99.0, 0.0
    found = values_CV.gather(1, _best(values_CV, 3)).sort(1).values
    assert torch.equal(found, values_CV.topk(3, 1).values.sort(1).values)
    assert all(len(set(row)) == 3 for row in _best(values_CV, 3).tolist())


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    hidden_NH, weight_VH, _, labels_N = case(seed=4)
    head = TeacherHead(weight_VH.detach(), VocabularySlice(0, V))
    for k in (None, 5):
        for divergence in DIVERGENCES.names():
            same = DenseTargets(hidden_NH.detach(), head, k)
            terms = distillation_terms(hidden_NH, weight_VH, same, labels_N, divergence=divergence)
            assert 0 <= terms.kd_sum < 1e-5
            grads = torch.autograd.grad(terms.loss, [hidden_NH, weight_VH])
            # Total variation has a kink here, and rounding chooses the side.
            assert divergence == "tvd" or all(grad.abs().max() < 1e-5 for grad in grads)


@pytest.mark.parametrize("k", [None, 4])
def test_a_student_with_more_rows_gives_them_no_mass_or_learns_that_they_have_none(k):
    """Padding takes no part; tokens that the teacher lacks have probability 0."""
    hidden_NH, weight_VH, targets, labels_N = case(seed=5, vocab=V + 9, teacher_vocab=V - 3, k=k)
    log_p_NV = torch.nn.functional.pad(log_probs(targets), (0, 3), value=-torch.inf)
    z_NV = (hidden_NH @ weight_VH.T).detach()[:, :V]
    ids = [list(range(V))] * N if k is None else unions(z_NV, log_p_NV, k)
    terms = check(
        targets,
        listed(log_p_NV, ids, 1.0),
        hidden_NH,
        weight_VH,
        labels_N,
        vocab_size=V,
        divergence="jsd",
    )
    grad_VH = torch.autograd.grad(
        distillation_terms(hidden_NH, weight_VH, targets, labels_N, vocab_size=V).loss, weight_VH
    )[0]
    assert (grad_VH[V:] == 0).all()
    assert (grad_VH[V - 3 : V] != 0).any() or k is not None
    assert terms.loss.isfinite()


def test_bfloat16_within_its_rounding():
    hidden_NH, weight_VH, targets, labels_N = case(seed=6, dtype=torch.bfloat16)
    every = listed(log_probs(targets), [list(range(V))] * N, 1.0)
    terms = distillation_terms(hidden_NH, weight_VH, targets, labels_N, divergence="reverse_kl")
    expected, *_ = dense_terms(hidden_NH, weight_VH, every, labels_N, divergence="reverse_kl")
    torch.testing.assert_close(terms.loss.double(), expected.double(), rtol=5e-2, atol=5e-3)


def test_what_does_not_fit_is_refused():
    hidden_NH, weight_VH, targets, labels_N = case(teacher_vocab=V + 1)
    with pytest.raises(ValueError, match=r"teacher has 54 ids, expected at most the head's 53"):
        distillation_terms(hidden_NH, weight_VH, targets, labels_N)
    hidden_NH, weight_VH, targets, labels_N = case()
    with pytest.raises(ValueError, match=r"11 hidden states and 3 targets"):
        distillation_terms(hidden_NH, weight_VH, targets.rows(0, 3), labels_N)
    with pytest.raises(ConfigError, match=r"ground_truth_residual: true with exact targets"):
        distillation_terms(hidden_NH, weight_VH, targets, labels_N, ground_truth_residual=True)

    class Group(VocabularySlice):
        ranks = 2

    head = dataclasses.replace(targets).head
    head.vocabulary = Group(0, V)
    with pytest.raises(ValueError, match="a slice of the vocabulary, expected all"):
        targets.rows(0, 3)
