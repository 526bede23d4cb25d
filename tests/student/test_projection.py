"""A teacher's hidden states in the student's space, read by the student's own head."""

import pytest
import torch

from megadistill.student.head import DistillationHead
from megadistill.student.projection import Projector, initial_projection, projection_sums
from megadistill.targets.projected import ProjectedTargets

N, H, S, V = 12, 10, 6, 40


def test_it_begins_where_the_heads_agree():
    generator = torch.Generator().manual_seed(0)
    head_VS, plain_SH = torch.randn(V, S, generator=generator), torch.randn(S, H)
    sums = projection_sums(head_VS, head_VS @ plain_SH, chunk=7)
    torch.testing.assert_close(initial_projection(sums), plain_SH, rtol=5e-3, atol=5e-3)
    parts = [projection_sums(head_VS[r], (head_VS @ plain_SH)[r]) for r in (slice(9), slice(9, V))]
    torch.testing.assert_close(sum(parts), sums, rtol=1e-5, atol=1e-4)


def test_fewer_tokens_than_the_student_is_wide_give_the_ridge_regression():
    generator = torch.Generator().manual_seed(2)
    head_VS = torch.randn(S - 2, S, generator=generator)
    teacher_VH = torch.randn(S - 2, H, generator=generator)
    found_SH = initial_projection(projection_sums(head_VS, teacher_VH))
    # Minimises |W P - U|^2 + r |P|^2, by stacking the second term below the first.
    ridge = 1e-3 * head_VS.double().square().sum() / S
    left = torch.cat([head_VS.double(), ridge.sqrt() * torch.eye(S, dtype=torch.float64)])
    right = torch.cat([teacher_VH.double(), torch.zeros(S, H, dtype=torch.float64)])
    expected_SH = torch.linalg.lstsq(left, right).solution
    torch.testing.assert_close(found_SH.double(), expected_SH, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("normalizer", [None, (20.0, 30.0)])
@pytest.mark.parametrize("settings", [{}, {"softcap": 3.0, "logit_scale": 0.5}])
def test_neither_side_moves_what_the_other_learns(settings, normalizer):
    """The student learns from the opinion as it stands, the projector by the head as it is."""
    generator = torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(S, V).double()
    head = DistillationHead(linear, vocab_size=V - 3, **settings)
    projector = Projector(H, S).double()
    hidden_NS = torch.randn(N, S, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher_NH = torch.randn(N, H, dtype=torch.float64, generator=generator)
    labels_N = torch.randint(V - 3, (N,), generator=generator)
    labels_N[2], has_N = -100, torch.arange(N) % 3 != 1
    targets = ProjectedTargets(teacher_NH, has_N).through(projector)
    terms = head(
        hidden_NS, labels_N, targets, ce_weight=0.5, temperature=2.0, normalizer=normalizer
    )
    terms.loss.backward()
    found = [p.grad for p in (hidden_NS, linear.weight, linear.bias, projector.weight)]

    def logits(rows, weight, bias):
        z = settings.get("logit_scale", 1) * (rows @ weight.T + bias)[:, : V - 3]
        cap = settings.get("softcap")
        return z if cap is None else cap * torch.tanh(z / cap)

    ours = hidden_NS.detach().requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in (linear.weight, linear.bias))
    matrix = projector.weight.detach().clone().requires_grad_()
    labelled = labels_N != -100
    both = labelled & has_N
    kd_n, ce_n = normalizer or (int(both.sum()), int(labelled.sum()))
    fixed = weight.detach(), bias.detach()
    opinion = logits(teacher_NH @ matrix.T.detach(), *fixed)
    p, q = (z.div(2).log_softmax(1)[both] for z in (opinion, logits(ours, weight, bias)))
    kd = 4 * (p.exp() * (p - q)).sum() / kd_n
    entropy = torch.nn.functional.cross_entropy
    ce = entropy(logits(ours, weight, bias)[labelled], labels_N[labelled], reduction="sum") / ce_n
    own = entropy(logits(teacher_NH @ matrix.T, *fixed)[both], labels_N[both], reduction="sum")
    loss = kd + 0.5 * ce + own / kd_n
    loss.backward()
    assert (terms.kd_count, terms.ce_count) == (int(both.sum()), int(labelled.sum()))
    # The opinion's logits are made in float32, as all of a teacher's are.
    torch.testing.assert_close(terms.loss.double(), loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(terms.sums["projector"], own.detach(), rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(found, (ours, weight, bias, matrix), strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-5, atol=1e-6)
