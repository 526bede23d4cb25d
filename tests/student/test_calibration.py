"""The calibration error out of the fused head, against one written on a blackboard."""

import pytest
import torch

from megadistill.student.calibration import BINS, calibration_bins, calibration_error
from megadistill.student.head import distillation_terms
from tests.student.loss.reference import naive_calibration_error, random_targets

N, H, VOCAB = 60, 8, 37


def problem(dtype, *, sharpness):
    """A student that is right at times, from unsure to sure, and labels that leave some out."""
    generator = torch.Generator().manual_seed(3)
    hidden_NH = torch.randn(N, H, generator=generator, dtype=torch.float64)
    weight_VH = sharpness * torch.randn(VOCAB, H, generator=generator, dtype=torch.float64)
    hidden_NH, weight_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
    labels_N = torch.randint(VOCAB, (N,), generator=generator)
    right_N = torch.rand(N, generator=generator) < 0.5
    labels_N[right_N] = (hidden_NH.double() @ weight_VH.double().T).argmax(1)[right_N]
    labels_N[::7] = -100
    return hidden_NH, weight_VH, labels_N


def targets_of(method):
    if method is None:
        return None
    counts = [(3 * n) % 5 for n in range(N)]
    temperature = 2.0 if method == "topk at 2" else 1.0
    return random_targets(counts, VOCAB, method=method.split()[0], temperature=temperature)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("method", [None, "varopt", "topk", "topk at 2"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 8.0, "logit_scale": 1.5, "label_smoothing": 0.1}]
)
def test_the_error_is_that_of_a_dense_student_whatever_it_is_trained_with(mode, method, options):
    hidden_NH, weight_VH, labels_N = problem(torch.float64, sharpness=0.5)
    targets = targets_of(method)
    terms = distillation_terms(
        hidden_NH,
        weight_VH.requires_grad_(),
        targets,
        labels_N,
        calibration=True,
        chunk_size=13,
        temperature=1.0 if targets is None else targets.temperature,
        ce_weight=0.3,
        mode=mode,
        **options,
    )
    logits_NV = options.get("logit_scale", 1.0) * (hidden_NH @ weight_VH.detach().T)
    if "softcap" in options:
        logits_NV = 8.0 * torch.tanh(logits_NV / 8.0)
    expected = naive_calibration_error(logits_NV, labels_N)
    assert expected > 0.05
    assert calibration_error(terms.calibration_M3) == pytest.approx(expected, rel=1e-9)
    assert terms.calibration_M3[:, 0].sum() == terms.ce_count
    assert (terms.calibration_M3[:, 0] > 0).sum() > 5  # bins that have something to say


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 30.0])
def test_it_holds_for_unsure_and_for_sure_students_of_lower_precision(dtype, sharpness):
    hidden_NH, weight_VH, labels_N = problem(dtype, sharpness=sharpness)
    terms = distillation_terms(
        hidden_NH, weight_VH, targets_of("topk"), labels_N, calibration=True, agreement=True
    )
    logits_NV = (hidden_NH @ weight_VH.T).double()
    expected = naive_calibration_error(logits_NV, labels_N)
    assert calibration_error(terms.calibration_M3) == pytest.approx(expected, abs=1e-6)


def test_bins_of_parts_add_up_to_those_of_the_whole_and_errors_do_not():
    generator = torch.Generator().manual_seed(1)
    prob_C = torch.rand(400, generator=generator, dtype=torch.float64)
    right_C = torch.rand(400, generator=generator) < prob_C
    whole = calibration_bins(prob_C, right_C)
    parts = [calibration_bins(prob_C[part::4], right_C[part::4]) for part in range(4)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-12, atol=0)
    assert sum(calibration_error(part) for part in parts) / 4 > 1.3 * calibration_error(whole)


def test_a_student_that_is_as_often_right_as_it_says_has_no_error():
    prob_C = torch.tensor([0.25] * 4 + [0.75] * 4 + [1.0])
    right_C = torch.tensor([True, False, False, False, True, True, True, False, True])
    bins_M3 = calibration_bins(prob_C, right_C)
    assert calibration_error(bins_M3) == 0
    assert bins_M3[BINS - 1].tolist() == [1, 1, 1]
    assert calibration_error(calibration_bins(prob_C, ~right_C)) == pytest.approx((2 + 2 + 1) / 9)


def test_without_positions_there_is_no_error_and_a_number_that_is_none_is_not_hidden():
    empty = torch.zeros(0)
    assert calibration_error(calibration_bins(empty, empty.bool())) == 0
    wild = calibration_bins(torch.tensor([0.5, torch.nan]), torch.tensor([True, False]))
    assert calibration_error(wild) != calibration_error(wild)


def test_unless_asked_for_the_bins_are_empty():
    hidden_NH, weight_VH, labels_N = problem(torch.float32, sharpness=1.0)
    terms = distillation_terms(hidden_NH, weight_VH, None, labels_N)
    assert terms.calibration_M3.shape == (BINS, 3)
    assert not terms.calibration_M3.any()


def test_a_probability_on_an_edge_belongs_to_the_bin_below_it():
    """As Guo et al. have it: bin m holds those in ((m - 1) / M, m / M]."""
    edges = torch.tensor([1 / 5, 2 / 5, 1.0, 1e-9], dtype=torch.float64)
    found = calibration_bins(edges, torch.ones(4, dtype=torch.bool))
    assert found[:, 0].nonzero()[:, 0].tolist() == [0, 2, 5, 14]
