"""The loss of several teachers is the sum of their losses, by share."""

import dataclasses

import pytest
import torch

from megadistill.api.fused_loss import fused_linear_distillation
from megadistill.errors import ConfigError
from megadistill.student.head import distillation_terms
from megadistill.targets.dense import DenseTargets
from megadistill.targets.ensemble import Ensemble
from megadistill.teacher.chunked_head import TeacherHead, VocabularySlice
from tests.allocation import AllocationWatch
from tests.cache.targets import METHODS, SAMPLED
from tests.student.loss.reference import random_targets
from tests.student.test_head import COUNTS, LABELS, VOCAB, WIDTH

KINDS = [*METHODS, "exact", "union"]
HARD = {"ce_weight": 0.4, "label_smoothing": 0.1, "z_loss": 0.05}


def targets_of(kind, seed, *, temperature=1.0, counts=COUNTS, taken=VOCAB):
    if kind in METHODS:
        return random_targets(counts, taken, method=kind, seed=seed, temperature=temperature)
    generator = torch.Generator().manual_seed(seed)
    weight_VH = torch.randn(taken, 3, generator=generator, dtype=torch.float64)
    hidden_NH = torch.randn(len(counts), 3, generator=generator, dtype=torch.float64)
    head = TeacherHead(weight_VH, VocabularySlice(0, taken), softcap=5.0)
    return DenseTargets(hidden_NH, head, 3 if kind == "union" else None)


def problem(extra_rows=0):
    generator = torch.Generator().manual_seed(7)
    hidden_NH, weight_VH, bias_V = (
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((len(COUNTS), WIDTH), (VOCAB + extra_rows, WIDTH), (VOCAB + extra_rows,))
    )
    return hidden_NH, weight_VH, bias_V, torch.tensor(LABELS)


def answer(targets, *, extra_rows=0, **options):
    """The terms, and the gradients of three times the loss."""
    hidden_NH, weight_VH, bias_V, labels_N = problem(extra_rows)
    terms = distillation_terms(
        hidden_NH,
        weight_VH,
        targets,
        labels_N,
        bias_V=bias_V,
        vocab_size=VOCAB,
        agreement=True,
        chunk_size=2,
        **options,
    )
    (3 * terms.loss).backward()
    return terms, [hidden_NH.grad, weight_VH.grad, bias_V.grad]


def check_sum(members, weights, **options):
    """An ensemble against a call for each teacher, of which the first has the hard terms."""
    found, grads = answer(Ensemble.of(members, weights), kd_weight=0.7, **options, **HARD)
    shares = [weight / sum(weights) for weight in weights]
    alone = [
        answer(member, kd_weight=0.7 * share, **options, **({} if n else HARD))
        for n, (member, share) in enumerate(zip(members, shares, strict=True))
    ]
    first = alone[0][0]
    kd_sum = sum(share * terms.kd_sum for share, (terms, _) in zip(shares, alone, strict=True))
    close(found.loss, sum(terms.loss for terms, _ in alone))
    close(found.kd_sum, kd_sum)
    close([found.ce_sum, found.sums["z"]], [first.ce_sum, first.sums["z"]])
    close(grads, [sum(each) for each in zip(*(theirs for _, theirs in alone), strict=True)])
    assert (found.kd_count, found.ce_count) == (first.kd_count, first.ce_count)
    assert found.agreed == first.agreed


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_value_and_gradients_are_the_sum_over_teachers(first, second, mode):
    # Whole distributions are of all positions; a list of other positions is refused with them.
    dense = {first, second} & {"exact", "union"}
    counts = [max(1, count) for count in COUNTS] if dense else COUNTS
    # One knows fewer ids than the other.
    members = [
        targets_of(first, 1, counts=counts),
        targets_of(second, 2, counts=[min(c, VOCAB - 2) for c in counts], taken=VOCAB - 2),
    ]
    check_sum(members, [1.0, 3.0], mode=mode, extra_rows=3, softcap=2.0, logit_scale=0.5)


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl", "adaptive_kl"])
def test_of_any_divergence_and_of_lists_made_at_different_temperatures(divergence):
    counts = [max(1, count) for count in COUNTS]
    members = [
        targets_of("topk", 1, temperature=2.0, counts=counts),
        targets_of("union", 2),
        targets_of("topp", 3, temperature=0.7, counts=counts),
        targets_of("exact", 4),
    ]
    check_sum(members, [2.0, 1.0, 1.0, 0.5], divergence=divergence, temperature=1.5)


def test_sampled_targets_and_lists_at_one_temperature():
    members = [targets_of(kind, n, temperature=2.0) for n, kind in enumerate(METHODS)]
    check_sum(members, [1.0, 1.0, 2.0, 1.0], temperature=2.0)


def test_the_residual_is_put_on_the_true_token_in_every_list():
    members = [targets_of(kind, n) for n, kind in enumerate(("topk", "topp"))]
    check_sum(members, [1.0, 2.0], ground_truth_residual=True)


@pytest.mark.parametrize("kind", KINDS)
def test_one_teacher_twice_is_that_teacher(kind):
    member = targets_of(kind, 5)
    (alone, grads), (twice, both), (single, same) = (
        answer(targets, **HARD)
        for targets in (member, Ensemble.of([member] * 2, [1.0, 2.0]), Ensemble.of([member], [5.0]))
    )
    close([*twice[:-1], *both], [*alone[:-1], *grads])
    assert torch.equal(single.loss, alone.loss)
    assert all(map(torch.equal, same, grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_agrees_with_the_double_one(dtype):
    members = [targets_of(kind, n) for n, kind in enumerate(METHODS)]
    results = []
    for chosen in (torch.float64, dtype):
        hidden_NH, weight_VH, bias_V, labels_N = problem()
        tensors = [
            t.detach().to(dtype).to(chosen).requires_grad_() for t in (hidden_NH, weight_VH, bias_V)
        ]
        loss = fused_linear_distillation(
            tensors[0],
            tensors[1],
            Ensemble.of(members, [1.0] * 4),
            labels_N,
            bias_V=tensors[2],
            **HARD,
        )
        loss.backward()
        results.append([loss.double(), *(t.grad.double() for t in tensors)])
    rtol, atol = (5e-4, 1e-5) if dtype == torch.float32 else (5e-2, 5e-3)
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=rtol, atol=atol)


def test_its_rows_are_those_of_every_teacher():
    whole = Ensemble.of([targets_of("topk", 1), targets_of("varopt", 2)], [1.0, 1.0])
    assert len(whole) == len(COUNTS)
    picked = torch.tensor([1, 3, 4])
    for part in (whole.take(picked), whole.torch("cpu")):
        assert len({len(part), *map(len, part.teachers)}) == 1
        assert part.shares == (0.5, 0.5)
    for member, of_all in zip(whole.take(picked).teachers, whole.teachers, strict=True):
        assert torch.equal(member.counts, of_all.counts[picked])


def test_no_tensor_of_positions_by_vocabulary_is_ever_allocated():
    positions, vocab = 600, 997
    hidden = torch.randn(positions, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    members = [random_targets([3] * positions, vocab, seed=s) for s in range(3)]
    with AllocationWatch() as watch:
        fused_linear_distillation(
            hidden, weight, Ensemble.of(members, [1.0] * 3), torch.arange(positions)
        ).backward()
    assert watch.largest <= -(-positions // 4) * vocab


def test_what_cannot_be_added_up_is_refused():
    hidden_NH, weight_VH, _, labels_N = problem()
    lists, others = targets_of("topk", 1), targets_of("topk", 2, counts=[1] * len(COUNTS))

    def ask(*members, **options):
        distillation_terms(
            hidden_NH, weight_VH, Ensemble.of(members, [1.0] * len(members)), labels_N, **options
        )

    for members in ((lists, others), (targets_of("exact", 1), lists)):
        with pytest.raises(ValueError, match=r"teacher 1 has targets where .* at 1 of 7 positions"):
            ask(*members)
    # Where no label is, nobody is asked.
    elsewhere = [c if label != -100 else 0 for c, label in zip(COUNTS, LABELS, strict=True)]
    ask(lists, targets_of("topk", 2, counts=elsewhere))
    for method in SAMPLED:
        with pytest.raises(ConfigError, match=f"jsd cannot be computed from {method} targets"):
            ask(lists, targets_of(method, 2), divergence="jsd")
    with pytest.raises(ConfigError, match=r"temperature: 1\.0 differs from the targets' .* 2\.0"):
        ask(lists, targets_of("varopt", 2, temperature=2.0))
    wrong = dataclasses.replace(lists, ids=torch.full_like(lists.ids, VOCAB))
    with pytest.raises(ValueError, match="target id 11 lies outside the head's 11 rows"):
        ask(lists, wrong)
    with pytest.raises(ValueError, match=r"targets of \[9, 4\] positions, expected equally many"):
        ask(lists, lists.rows(0, 4))
    with pytest.raises(ValueError, match="1 teachers and 2 shares"):
        Ensemble((lists,), (0.5, 0.5))
    with pytest.raises(ValueError, match="expected none below 0 and a sum of 1"):
        Ensemble((lists, others), (0.5, 0.7))
