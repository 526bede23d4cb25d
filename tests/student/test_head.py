"""The fused head against a dense reference, and what it never allocates."""

import pytest
import torch

from megadistill.api.fused_loss import fused_linear_distillation
from megadistill.errors import ConfigError
from megadistill.student.head import DistillationHead, distillation_terms
from megadistill.student.loss.fused import choose_mode, default_chunk
from megadistill.student.loss.terms import LossTerms
from megadistill.targets.divergence_registry import DIVERGENCES
from tests.allocation import AllocationWatch
from tests.cache.targets import METHODS, SAMPLED
from tests.student.loss.reference import dense_terms, random_targets

SERVED = [
    (m, d) for m in METHODS for d in (DIVERGENCES.names() if m not in SAMPLED else ["forward_kl"])
]
COUNTS = [3, 0, 1, 7, 11, 2, 5, 4, 1]
LABELS = [2, 4, -100, 0, 10, 3, -100, 7, 1]
VOCAB, WIDTH = 11, 5


def problem(
    method="varopt",
    *,
    dtype=torch.float64,
    scale=1.0,
    temperature=1.0,
    labels=LABELS,
    counts=COUNTS,
    taken=VOCAB,
):
    """Hidden states, weight, bias, targets that name ids below `taken`, labels."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(COUNTS), WIDTH, dtype=torch.float64, generator=generator) * scale
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=generator)
    bias = torch.randn(VOCAB, dtype=torch.float64, generator=generator)
    tensors = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    targets = random_targets(counts, taken, method=method, temperature=temperature)
    return (*tensors, targets, torch.tensor(labels))


def compare(
    method,
    *,
    dtype=torch.float64,
    scale=1.0,
    rtol=1e-9,
    atol=1e-11,
    bias=True,
    made_at=None,
    **options,
):
    temperature = made_at or options.get("temperature", 1.0)
    results = []
    for function in (distillation_terms, dense_terms):
        hidden, weight, bias_V, targets, labels = problem(
            method, dtype=dtype, scale=scale, temperature=temperature
        )
        extra = {"bias_V": bias_V} if bias else {}
        if function is distillation_terms:
            extra["chunk_size"] = 2
        found = function(hidden, weight, targets, labels, **extra, **options)
        loss, kd_sum, ce_sum = loss_and_sums(found)
        (3 * loss).backward()
        grads = [t.grad.double() for t in (hidden, weight, bias_V) if t.grad is not None]
        results.append([loss.double(), kd_sum, ce_sum, *grads])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=rtol, atol=atol)


def loss_and_sums(found):
    """(loss, kd_sum, ce_sum) of `LossTerms`, or of the reference, which gives just these."""
    return (found.loss, found.kd_sum, found.ce_sum) if isinstance(found, LossTerms) else found


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


@pytest.mark.parametrize(("method", "divergence"), SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_agrees_with_the_double_reference(method, divergence, dtype):
    single = dtype == torch.float32
    rtol, atol = (5e-4, 1e-5) if single else (5e-2, 5e-3)
    for scale in (0.1, 1.0, 10.0) if single else (0.1, 1.0):
        compare(
            method,
            dtype=dtype,
            scale=scale,
            divergence=divergence,
            ce_weight=0.5,
            z_loss=0.01,
            rtol=rtol,
            atol=atol,
        )


# The weights of adaptive_kl are constants to its gradient: test_divergences.py holds them.
@pytest.mark.parametrize(("method", "divergence"), [s for s in SERVED if s[1] != "adaptive_kl"])
def test_gradcheck(method, divergence):
    hidden, weight, bias, targets, labels = problem(method, temperature=1.5)

    def loss(hidden, weight, bias):
        return fused_linear_distillation(
            hidden,
            weight,
            targets,
            labels,
            bias_V=bias,
            temperature=1.5,
            ce_weight=0.4,
            label_smoothing=0.1,
            softcap=3.0,
            chunk_size=4,
            divergence=divergence,
            z_loss=0.1,
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), check_undefined_grad=False)


@pytest.mark.parametrize("divergence", DIVERGENCES.names())
@pytest.mark.parametrize("method", ["topk", "topp"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ce_weight": 0.5, "kd_weight": 0.7, "z_loss": 0.2},
        {"beta": 0.1, "alpha": 0.3, "head_mass": 0.2},
        {"beta": 0.9, "alpha": 0.7, "head_mass": 0.9, "softcap": 2.0, "logit_scale": 0.5},
        {"temperature": 2.0, "ce_weight": 0.3, "label_smoothing": 0.2, "z_loss": 0.2},
    ],
    ids=lambda o: ",".join(o) or "plain",
)
def test_every_divergence_equals_the_dense_reference(method, divergence, options):
    compare(method, divergence=divergence, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES.names())
@pytest.mark.parametrize(("made_at", "temperature"), [(1.0, 3.0), (2.0, 1.0), (0.7, 0.5)])
def test_another_temperature_softens_the_buckets_of_both_sides(divergence, made_at, temperature):
    compare(
        "topk",
        divergence=divergence,
        made_at=made_at,
        temperature=temperature,
        ce_weight=0.5,
        z_loss=0.1,
    )


@pytest.mark.parametrize("method", ["topk", "topp"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_ground_truth_residual_puts_the_missing_mass_on_the_true_token(method, temperature):
    compare(method, ground_truth_residual=True, ce_weight=0.5, temperature=temperature)


def test_the_ground_truth_residual_changes_the_loss():
    hidden, weight, _, targets, labels = problem("topk")
    plain, given = (
        fused_linear_distillation(hidden, weight, targets, labels, ground_truth_residual=flag)
        for flag in (False, True)
    )
    assert abs(plain - given) > 1e-3


@pytest.mark.parametrize("divergence", DIVERGENCES.names())
def test_logits_of_minus_infinity_have_no_probability_and_no_gradient(divergence):
    # No target and no label names the last id, which the bias forbids.
    hidden, weight, bias, targets, labels = problem(
        "topk", counts=[3, 0, 1, 7, 10, 2, 5, 4, 1], taken=VOCAB - 1
    )
    labels = labels.clamp(max=VOCAB - 2)
    results = []
    for function in (distillation_terms, dense_terms):
        tensors = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
        with torch.no_grad():
            tensors[2][-1] = -torch.inf
        found = function(
            tensors[0],
            tensors[1],
            targets,
            labels,
            bias_V=tensors[2],
            divergence=divergence,
            ce_weight=0.5,
        )
        found = loss_and_sums(found)
        found[0].backward()
        results.append([*found, *(t.grad for t in tensors)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)
    assert results[0][-1][-1] == 0


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 2.0}])
def test_rows_beyond_the_vocabulary_are_padding_without_probability_or_gradient(mode, options):
    hidden, weight, bias, targets, labels = problem("topk")
    results = []
    for extra in (0, 5):
        rows = torch.nn.functional.pad(weight.detach(), (0, 0, 0, extra), value=3.0)
        tensors = [
            hidden.detach().clone(),
            rows,
            torch.nn.functional.pad(bias.detach(), (0, extra)),
        ]
        for tensor in tensors:
            tensor.requires_grad_()
        terms = distillation_terms(
            tensors[0],
            tensors[1],
            targets,
            labels,
            bias_V=tensors[2],
            vocab_size=VOCAB,
            ce_weight=0.5,
            label_smoothing=0.1,
            mode=mode,
            agreement=True,
            **options,
        )
        terms.loss.backward()
        assert (tensors[1].grad[VOCAB:] == 0).all()
        assert (tensors[2].grad[VOCAB:] == 0).all()
        results.append([*terms, tensors[0].grad, tensors[1].grad[:VOCAB], tensors[2].grad[:VOCAB]])
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_gradients_recomputed_in_the_backward_are_those_formed_in_the_forward(dtype, divergence):
    results = []
    for mode in ("forward", "recompute"):
        hidden, weight, bias, targets, labels = problem("topk", dtype=dtype)
        loss = fused_linear_distillation(
            hidden,
            weight,
            targets,
            labels,
            bias_V=bias,
            divergence=divergence,
            mode=mode,
            ce_weight=0.5,
            softcap=3.0,
        )
        (3 * loss).backward()
        results.append([loss, hidden.grad, weight.grad, bias.grad])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    for formed, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, formed, rtol=tolerance, atol=tolerance)


def test_a_memory_budget_chooses_what_fits_it():
    hidden, weight = torch.randn(600, 8, requires_grad=True), torch.randn(97, 8, requires_grad=True)
    targets, labels = random_targets([3] * 600, 97), torch.arange(600) % 97
    kept = 600 * 8 * 4 + 97 * 8 * 4
    budgets = {kept / 2**30: kept, (kept - 1) / 2**30: 0}
    assert [choose_mode(hidden, weight, b) for b in (None, *budgets)] == [
        "forward",
        "forward",
        "recompute",
    ]
    held = {}
    for budget in budgets:
        loss = fused_linear_distillation(hidden, weight, targets, labels, memory_budget=budget)
        saved = loss.grad_fn.saved_tensors
        inputs = {hidden.data_ptr(), weight.data_ptr()}
        held[budget] = sum(t.nbytes for t in saved if t is not None and t.data_ptr() not in inputs)
    assert held == budgets


def test_recomputing_may_go_backward_twice():
    hidden, weight, _, targets, labels = problem()
    loss = 2 * fused_linear_distillation(hidden, weight, targets, labels, mode="recompute")
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_an_unknown_mode_or_an_impossible_vocabulary_is_refused():
    hidden, weight, _, targets, labels = problem()
    with pytest.raises(ValueError, match="mode is 'backward', expected one of forward, recompute"):
        distillation_terms(hidden, weight, targets, labels, mode="backward")
    with pytest.raises(ValueError, match="vocab_size is 12, expected 1 to the weight's 11 rows"):
        distillation_terms(hidden, weight, targets, labels, vocab_size=12)
    with pytest.raises(ValueError, match="label 10 lies outside the head's 10 rows"):
        distillation_terms(hidden, weight, targets, labels, vocab_size=10)


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


@pytest.mark.parametrize("method", ["varopt", "topk"])
def test_no_tensor_of_positions_by_vocabulary_is_ever_allocated(method):
    positions, vocab = 600, 997
    hidden = torch.randn(positions, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    targets = random_targets([3] * positions, vocab, method=method)
    labels = torch.arange(positions)
    with AllocationWatch() as watch:
        fused_linear_distillation(hidden, weight, targets, labels, ce_weight=1.0).backward()
    assert watch.largest <= default_chunk(positions, vocab) * vocab < positions * vocab / 3.9


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
        distillation_terms(hidden, weight, targets, labels)


def test_a_target_id_beyond_the_head_is_refused():
    hidden, weight, _, targets, labels = problem()
    targets.ids[0] = 11
    with pytest.raises(ValueError, match="target id 11 lies outside"):
        distillation_terms(hidden, weight, targets, labels)


def test_another_temperature_than_the_targets_is_refused():
    hidden, weight, _, targets, labels = problem()
    with pytest.raises(ConfigError, match=r"loss\.temperature: 2\.0 differs"):
        distillation_terms(hidden, weight, targets, labels, temperature=2.0)


def test_backward_twice_is_an_error_and_not_a_wrong_gradient():
    hidden, weight, _, targets, labels = problem()
    loss = 2 * fused_linear_distillation(hidden, weight, targets, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
