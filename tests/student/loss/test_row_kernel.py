"""Rows of logits: lists that hold every id have no tail, whatever rounding left in it."""

import math

import pytest
import torch

from megadistill.student.head import distillation_terms
from megadistill.targets import SparseTargets

N, H, V = 4, 8, 11


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("tail", [0.0, 1e-7])
def test_a_tail_without_ids_counts_nothing(divergence, tail):
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(N, H, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_VH = torch.randn(V, H, generator=generator, dtype=torch.float64)
    p_NV = torch.softmax(torch.randn(N, V, generator=generator), 1)
    targets = SparseTargets(
        offsets=torch.arange(0, N * V + 1, V),
        ids=torch.arange(V).repeat(N),
        weights=p_NV.flatten(),
        tail=torch.full((N,), tail),
        method="topk",
    )
    terms = distillation_terms(
        hidden_NH, weight_VH, targets, torch.arange(N), divergence=divergence, ce_weight=0.0
    )
    terms.loss.backward()
    p, log_q = p_NV.double(), torch.log_softmax((hidden_NH @ weight_VH.T).detach(), 1)
    q = log_q.exp()
    m = (p + q) / 2
    expected = {
        "forward_kl": (p * (p.log() - log_q)).sum(),
        "reverse_kl": (q * (log_q - p.log())).sum(),
        "jsd": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
        "tvd": (p - q).abs().sum() / 2,
    }[divergence]
    torch.testing.assert_close(terms.loss.detach(), expected / N, rtol=1e-5, atol=1e-6)
    assert hidden_NH.grad.isfinite().all()


def test_reverse_kl_counts_a_teachers_zero_as_the_least_normal_float32():
    """An id that float32 could not hold costs e^-87.3's logarithm, and not infinity."""
    generator = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(N, H, generator=generator, requires_grad=True)
    weight_VH = torch.randn(V, H, generator=generator)
    targets = SparseTargets(
        offsets=torch.arange(N + 1),
        ids=torch.arange(N),
        weights=torch.ones(N),
        tail=torch.zeros(N),
        method="topk",
    )
    terms = distillation_terms(
        hidden_NH, weight_VH, targets, torch.arange(N), divergence="reverse_kl", ce_weight=0.0
    )
    terms.loss.backward()
    q_NV = torch.softmax((hidden_NH.double() @ weight_VH.double().T).detach(), 1)
    q_N = q_NV[torch.arange(N), torch.arange(N)]
    floor = torch.finfo(torch.float32).tiny
    expected_N = q_N * q_N.log() + (1 - q_N) * ((1 - q_N).log() - math.log(floor))
    assert terms.loss.item() == pytest.approx(expected_N.mean().item(), rel=1e-5)
    assert hidden_NH.grad.isfinite().all()
