"""The fused head against a dense reference, and what it never allocates."""

import pytest
import torch

from megadistill.errors import ConfigError
from megadistill.student.head import (
    DistillationHead,
    default_chunk,
    distillation_terms,
    fused_linear_distillation,
)
from megadistill.targets import METHODS
from tests.allocation import AllocationWatch
from tests.student.reference import dense_terms, random_targets

COUNTS = [3, 0, 1, 7, 11, 2, 5, 4, 1]
LABELS = [2, 4, -100, 0, 10, 3, -100, 7, 1]
VOCAB, WIDTH = 11, 5


def problem(method="varopt", *, dtype=torch.float64, scale=1.0, temperature=1.0, labels=LABELS):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(COUNTS), WIDTH, dtype=torch.float64, generator=generator) * scale
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=generator)
    bias = torch.randn(VOCAB, dtype=torch.float64, generator=generator)
    tensors = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    targets = random_targets(COUNTS, VOCAB, method=method, temperature=temperature)
    return (*tensors, targets, torch.tensor(labels))


def compare(method, *, dtype=torch.float64, scale=1.0, rtol=1e-9, atol=1e-11, bias=True, **options):
    temperature = options.get("temperature", 1.0)
    results = []
    for function in (distillation_terms, dense_terms):
        hidden, weight, bias_V, targets, labels = problem(
            method, dtype=dtype, scale=scale, temperature=temperature
        )
        extra = {"bias_V": bias_V} if bias else {}
        if function is distillation_terms:
            extra["chunk_size"] = 2
        loss, kd_sum, ce_sum, *_ = function(hidden, weight, targets, labels, **extra, **options)
        (3 * loss).backward()
        grads = [t.grad.double() for t in (hidden, weight, bias_V) if t.grad is not None]
        results.append([loss.double(), kd_sum, ce_sum, *grads])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=rtol, atol=atol)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ce_weight": 0.5, "kd_weight": 0.7},
        {"ce_weight": 1.0, "kd_weight": 0.0, "label_smoothing": 0.1},
        {"temperature": 2.0, "ce_weight": 0.3, "label_smoothing": 0.2},
        {"normalizer": (100.0, 50.0), "ce_weight": 1.0},
        {"logit_scale": 0.25, "softcap": 2.0, "ce_weight": 0.3, "temperature": 1.5},
        {"bias": False, "softcap": 1.0},
    ],
    ids=lambda o: ",".join(o) or "plain",
)
def test_value_and_gradients_equal_the_dense_reference(method, options):
    compare(method, **options)


@pytest.mark.parametrize("method", ["varopt", "topk"])
def test_single_precision_agrees_with_the_double_reference(method):
    for scale in (0.1, 1.0, 10.0):
        compare(method, dtype=torch.float32, scale=scale, ce_weight=0.5, rtol=5e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["varopt", "topk"])
def test_bfloat16_stays_near_its_own_rounding(method):
    compare(method, dtype=torch.bfloat16, ce_weight=0.5, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    hidden, weight, bias, targets, labels = problem(method, temperature=1.5)

    def loss(hidden, weight, bias):
        return fused_linear_distillation(
            hidden, weight, targets, labels, bias_V=bias, temperature=1.5, ce_weight=0.4,
            label_smoothing=0.1, softcap=3.0, chunk_size=4,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), check_undefined_grad=False)


def test_the_chunk_size_changes_nothing_but_rounding():
    hidden, weight, _, targets, labels = problem("topk")
    losses = [
        fused_linear_distillation(hidden, weight, targets, labels, chunk_size=c).item()
        for c in (1, 2, 3, 100)
    ]
    assert max(losses) - min(losses) < 1e-12


def test_ignored_positions_touch_nothing_even_where_they_hold_nan():
    hidden, weight, _, targets, labels = problem("topk")
    expected = fused_linear_distillation(hidden, weight, targets, labels)
    broken = hidden.detach().clone()
    broken[labels == -100] = torch.nan
    broken.requires_grad_()
    loss = fused_linear_distillation(broken, weight, targets, labels)
    loss.backward()
    assert loss == expected
    assert broken.grad.isfinite().all()
    assert (broken.grad[labels == -100] == 0).all()


def test_a_batch_with_nothing_to_learn_still_touches_the_weight():
    hidden, weight, _, targets, labels = problem(labels=[-100] * len(COUNTS))
    terms = distillation_terms(hidden, weight, targets, labels, ce_weight=1.0)
    terms.loss.backward()
    assert terms.loss == 0
    assert (terms.kd_count, terms.ce_count) == (0, 0)
    assert (weight.grad == 0).all()
    assert (hidden.grad == 0).all()


def test_hard_labels_alone_are_cross_entropy():
    hidden, weight, _, _, labels = problem()
    ours = fused_linear_distillation(hidden, weight, None, labels, ce_weight=1.0)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(hidden @ weight.T, labels))


def test_counts_say_which_positions_took_part_in_which_term():
    hidden, weight, _, targets, labels = problem()
    terms = distillation_terms(hidden, weight, targets, labels)
    assert (terms.kd_count, terms.ce_count) == (6, 7)


def test_peaked_logits_keep_the_tail_that_one_minus_the_listed_mass_loses():
    # The listed id has all but e^-40 of the student's mass: in float32 it is exactly 1.
    logits = torch.zeros(1, 8)
    logits[0, 2] = 40.0
    targets = random_targets([1], 8, method="topk")
    targets.ids[0], targets.weights[0], targets.tail[0] = 2, 0.75, 0.25
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = logits.T.clone().requires_grad_()
    labels = torch.tensor([2])
    loss = fused_linear_distillation(hidden, weight, targets, labels)
    loss.backward()
    wide = logits.T.double().requires_grad_()
    expected, *_ = dense_terms(hidden.detach(), wide, targets, labels)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.grad.double(), wide.grad, rtol=1e-5, atol=1e-8)


def test_the_divergence_is_zero_where_student_equals_teacher_and_never_negative():
    generator = torch.Generator().manual_seed(3)
    lowest = torch.inf
    for case in range(300):
        vocab = int(torch.randint(2, 40, (1,), generator=generator))
        logits = torch.randn(1, vocab, generator=generator) * 10 ** float(case % 3)
        p = logits.double().softmax(1).float()
        k = 1 + case % vocab
        top = p.topk(k)
        targets = random_targets([k], vocab, method="topk")
        targets.ids[:], targets.weights[:] = top.indices[0], top.values[0]
        targets.tail[0] = p[0].double().sum() - top.values.double().sum() if k < vocab else 0
        targets.tail.clamp_(min=0)
        label = torch.zeros(1, dtype=torch.long)
        for noise in (0.0, 1e-4, 1.0):
            student = logits + noise * torch.randn(logits.shape, generator=generator)
            value = distillation_terms(torch.ones(1, 1), student.T, targets, label).kd_sum
            lowest = min(lowest, value.item())
            if noise == 0.0:
                assert value < 1e-6
    assert lowest >= 0


@pytest.mark.parametrize("method", ["varopt", "topk"])
def test_no_tensor_of_positions_by_vocabulary_is_ever_allocated(method):
    positions, vocab = 600, 997
    hidden = torch.randn(positions, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    targets = random_targets([3] * positions, vocab, method=method)
    labels = torch.arange(positions)
    with AllocationWatch() as watch:
        fused_linear_distillation(hidden, weight, targets, labels, ce_weight=1.0).backward()
    assert watch.largest <= default_chunk(positions, vocab) * vocab < positions * vocab / 7


def test_a_head_without_labels_is_the_linear_layer_it_replaced():
    linear = torch.nn.Linear(4, 9)
    head = DistillationHead(linear)
    hidden = torch.randn(2, 3, 4)
    assert torch.equal(head(hidden), linear(hidden))
    assert head.weight is linear.weight
    terms = head(hidden, torch.zeros(6, dtype=torch.long), ce_weight=1.0)
    expected = torch.nn.functional.cross_entropy(
        linear(hidden).reshape(6, 9), torch.zeros(6).long()
    )
    torch.testing.assert_close(terms.loss, expected)


def test_more_rows_than_the_teachers_vocabulary_are_padding_that_targets_never_name():
    hidden, weight, _, targets, labels = problem("topk")
    padded = torch.cat([weight, torch.full((5, WIDTH), -1.0)]).detach().requires_grad_()
    loss = fused_linear_distillation(hidden, padded, targets, labels)
    expected, *_ = dense_terms(hidden, padded, targets, labels)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [11] * 9}, "label 11 lies outside the head's 11 rows"),
        ({"labels": [0] * 8}, "9 hidden states and 8 labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, message):
    hidden, weight, _, targets, labels = problem(**change)
    with pytest.raises(ValueError, match=message):
        fused_linear_distillation(hidden, weight, targets, labels)


def test_a_target_id_beyond_the_head_is_refused():
    hidden, weight, _, targets, labels = problem()
    targets.ids[0] = 11
    with pytest.raises(ValueError, match="target id 11 lies outside"):
        fused_linear_distillation(hidden, weight, targets, labels)


def test_another_temperature_than_the_targets_is_refused():
    hidden, weight, _, targets, labels = problem()
    with pytest.raises(ConfigError, match=r"loss\.temperature: 2\.0 differs"):
        fused_linear_distillation(hidden, weight, targets, labels, temperature=2.0)


def test_backward_twice_is_an_error_and_not_a_wrong_gradient():
    hidden, weight, _, targets, labels = problem()
    loss = 2 * fused_linear_distillation(hidden, weight, targets, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
