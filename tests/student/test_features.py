"""The two losses of features, a position each."""

import pytest
import torch

from megadistill.student.features import attention_loss, hidden_loss


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_states_that_agree_cost_nothing_and_others_do(kind):
    generator = torch.Generator().manual_seed(0)
    ours_MH, theirs_MH = torch.randn(2, 5, 16, generator=generator, dtype=torch.bfloat16)
    assert hidden_loss(theirs_MH, theirs_MH, kind).abs().max() < 1e-6
    found_M = hidden_loss(ours_MH, theirs_MH, kind)
    assert found_M.dtype == torch.float32
    a, b = ours_MH.double(), theirs_MH.double()
    cosines_M = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    expected_M = 1 - cosines_M if kind == "cosine" else ((a - b) ** 2).sum(1) / (b**2).sum(1)
    torch.testing.assert_close(found_M.double(), expected_M, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_the_squared_error_is_relative_to_the_teachers_state_position_by_position(scale):
    generator = torch.Generator().manual_seed(1)
    ours_MH, theirs_MH = torch.randn(2, 4, 16, generator=generator)
    theirs_MH[1] *= 1000  # a massive activation
    plain_M = hidden_loss(ours_MH, theirs_MH, "mse")
    torch.testing.assert_close(hidden_loss(scale * ours_MH, scale * theirs_MH, "mse"), plain_M)
    torch.testing.assert_close(hidden_loss(0 * ours_MH, theirs_MH, "mse"), torch.ones(4))
    assert hidden_loss(0 * ours_MH, 0 * ours_MH, "mse").abs().max() == 0


def test_attention_is_compared_by_terms_that_cannot_be_negative():
    generator = torch.Generator().manual_seed(0)
    p_MT, q_MT = torch.randn(2, 64, 32, generator=generator).mul_(3).softmax(2)
    torch.testing.assert_close(
        attention_loss(p_MT, q_MT), (p_MT * (p_MT.log() - q_MT.log())).sum(1), rtol=1e-4, atol=1e-5
    )
    assert attention_loss(p_MT, p_MT).abs().max() < 1e-6
    assert (attention_loss(p_MT, q_MT * 0.7) >= 0).all()  # a sink took the rest


def test_where_nobody_attends_nothing_is_lost_and_gradients_are_finite():
    p_MT = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    q_MT = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    found_M = attention_loss(p_MT, q_MT)
    assert found_M[0].abs() < 1e-6
    assert found_M[1] > 20
    found_M.sum().backward()
    assert q_MT.grad.isfinite().all()
