"""Divergences row by row: 10,000 generated cases each, and the limits that formulas trip over."""

import math

import pytest
import torch

from megadistill.errors import ConfigError
from megadistill.student.loss.divergences import Buckets, ChosenDivergence, divergence_of
from megadistill.student.loss.divergences.adaptive_kl import head_weight
from megadistill.student.loss.divergences.divergence import TINY, kl_terms, log_mixture_ratio
from megadistill.student.loss.row_kernel import Entries, Terms, distill_rows
from megadistill.targets import SparseTargets
from megadistill.targets.divergence_registry import DIVERGENCES
from tests.student.loss.reference import naive_divergence

CASES, WIDEST = 10_000, 40
NAMES = DIVERGENCES.names()
NOISES = (0.0, 1e-6, 1e-3, 1.0, 30.0)


class Generated:
    """Teachers and students over 2 to 40 ids, flat to peaked; the student from equal to far off.

    Ids that a case does not have carry logits of -inf. Logits are multiples of 2^-12, so that
    shifting them by a whole number is exact in float32.
    """

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        case = torch.arange(CASES)
        self.size = 2 + torch.randint(WIDEST - 1, (CASES,), generator=generator)
        absent = torch.arange(WIDEST) >= self.size[:, None]
        scale = 10.0 ** (case % 4 - 1)[:, None]
        logits = (torch.randn(CASES, WIDEST, generator=generator) * scale * 4096).round() / 4096
        noise = torch.tensor(NOISES)[case // 4 % len(NOISES)][:, None]
        self.equal = (noise == 0)[:, 0]
        moved = noise * torch.randn(CASES, WIDEST, generator=generator)
        self.teacher = logits.masked_fill(absent, -torch.inf)
        student = ((logits + moved) * 4096).round() / 4096
        self.student = student.masked_fill(absent, -torch.inf)
        self.k = 1 + (torch.rand(CASES, generator=generator) * self.size).long()
        self.label = torch.zeros(CASES, dtype=torch.long)

        wide = self.teacher.double().softmax(1)
        top = wide.sort(1, descending=True)
        listed = torch.arange(WIDEST) < self.k[:, None]
        self.ids = top.indices
        self.listed = listed
        self.p = torch.where(listed, top.values, 0.0)
        self.tail = torch.where(listed, 0.0, top.values).sum(1)
        self.targets = SparseTargets(
            offsets=torch.cat([torch.zeros(1, dtype=torch.long), self.k.cumsum(0)]),
            ids=top.indices[listed],
            weights=top.values[listed].float(),
            tail=self.tail.float(),
            method="topk",
        )

    def values(self, kind: ChosenDivergence, student: torch.Tensor, terms: Terms | None = None):
        """(value by row, gradient by logit)."""
        terms = terms or Terms(kd=1.0, ce=0.0, divergence=kind)
        z = student.clone()
        entries = Entries.of(self.targets, z.dtype)
        return distill_rows(z, entries, self.label, terms).kd, z

    def reference(self, name: str):
        """Values in float64, naively; a p that float32 cannot hold is the least normal one."""
        q = self.student.double().softmax(1).gather(1, self.ids)
        q_tail = torch.where(self.listed, 0.0, q).sum(1)
        found = []
        for n in range(CASES):
            k, there = int(self.k[n]), slice(None if self.tail[n] else -1)
            p_n = torch.cat([self.p[n, :k], self.tail[n : n + 1]]).clamp_min(TINY)[there]
            q_n = torch.cat([q[n, :k], q_tail[n : n + 1]])[there]
            found.append(float(naive_divergence(name, p_n, q_n)))
        return torch.tensor(found, dtype=torch.float64)


@pytest.fixture(scope="module")
def generated() -> Generated:
    return Generated()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parameter", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_divergence_is_negative_and_equal_sides_are_at_zero(generated, name, parameter, dtype):
    kind = divergence_of(name, beta=parameter, alpha=parameter, head_mass=parameter)
    value, gradient = generated.values(kind, generated.student.to(dtype))
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert (value >= 0).all()
    # The gradient pushes mass from one id to others, never in or out.
    assert gradient.double().sum(1).abs().max() < 1e-4 * gradient.abs().max()
    # The weights are float32 of a float64 softmax; total variation is of first order in rounding.
    atol = 2e-5 if name == "tvd" else 1e-9
    assert value[generated.equal].max() < atol
    assert value[~generated.equal].max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_of_the_logits_changes_nothing(generated, name):
    kind = divergence_of(name)
    value, gradient = generated.values(kind, generated.student)
    for shift in (-64.0, 100.0):
        moved, moved_gradient = generated.values(kind, generated.student + shift)
        torch.testing.assert_close(moved, value, rtol=5e-4, atol=1e-5)
        torch.testing.assert_close(moved_gradient, gradient, rtol=5e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_peaked_rows_are_right_where_one_minus_the_listed_mass_would_fail(generated, name):
    kind = divergence_of(name)
    value, _ = generated.values(kind, generated.student)
    reference = generated.reference(name)
    q = generated.student.softmax(1).gather(1, generated.ids)
    remainder = 1 - torch.where(generated.listed, q, 0.0).sum(1)
    has_tail = generated.k < generated.size
    lost = has_tail & (remainder <= 0)
    assert lost.float().mean() > 0.1
    # A probability that float64 too cannot hold is infinitely far in the reference.
    sound = reference.isfinite() & (reference < 60)
    assert sound[lost].float().mean() > 0.5
    torch.testing.assert_close(
        value[sound].double(), reference[sound], rtol=5e-4, atol=1e-5, equal_nan=False
    )


def finite_differences(function, z_CV, step=1e-6):
    gradient = torch.zeros_like(z_CV)
    for v in range(z_CV.shape[1]):
        moved = torch.zeros_like(z_CV)
        moved[:, v] = step
        gradient[:, v] = (function(z_CV + moved) - function(z_CV - moved)) / (2 * step)
    return gradient


def row_problem(counts=(3, 1, 7, 5), vocab=9):
    from tests.student.loss.reference import random_targets

    targets = random_targets(counts, vocab, method="topk", seed=5)
    generator = torch.Generator().manual_seed(2)
    z_CV = torch.randn(len(counts), vocab, dtype=torch.float64, generator=generator) * 2
    return targets, z_CV, torch.zeros(len(counts), dtype=torch.long)


def rows_of(name, targets, labels, z_CV):
    z_CV = z_CV.clone()
    terms = Terms(kd=1.0, ce=0.0, divergence=divergence_of(name))
    return distill_rows(z_CV, Entries.of(targets, z_CV.dtype), labels, terms).kd, z_CV


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences_adaptive_weights_held(name):
    targets, z_CV, labels = row_problem()
    share = None
    if name == "adaptive_kl":
        table, weight = targets.padded()
        log_q = z_CV.log_softmax(1)
        listed = torch.arange(table.shape[1]) < targets.counts[:, None]
        q = torch.where(listed, log_q.exp().gather(1, table), 0.0)
        p = torch.cat([weight.double(), targets.tail.double()[:, None]], 1)
        share = head_weight(Buckets.of(p, torch.cat([q, 1 - q.sum(1, keepdim=True)], 1).log()), 0.5)
        assert share.min() > 0.05
        assert share.max() < 0.95

    def value(z_CV):
        if share is None:
            return rows_of(name, targets, labels, z_CV)[0]
        ahead, _ = rows_of("forward_kl", targets, labels, z_CV)
        back, _ = rows_of("reverse_kl", targets, labels, z_CV)
        return share[:, 0] * ahead + (1 - share[:, 0]) * back

    found, gradient = rows_of(name, targets, labels, z_CV)
    torch.testing.assert_close(found, value(z_CV))
    torch.testing.assert_close(gradient, finite_differences(value, z_CV), rtol=1e-6, atol=1e-8)


def test_skewed_and_jensen_shannon_tend_to_forward_and_reverse():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    q = torch.tensor([[0.2, 0.2, 0.2, 0.4]], dtype=torch.float64)
    both = Buckets.of(p, q.log())

    def value(name, **parameters):
        return float(divergence_of(name, **parameters).terms(both)[0].sum())

    ahead, back = value("forward_kl"), value("reverse_kl")
    assert value("skewed_kl", alpha=1e-9) == pytest.approx(ahead, rel=1e-6)
    assert value("skewed_reverse_kl", alpha=1e-9) == pytest.approx(back, rel=1e-6)
    assert value("jsd", beta=1e-9) / 1e-9 == pytest.approx(ahead, rel=1e-6)
    assert value("jsd", beta=1 - 1e-9) / 1e-9 == pytest.approx(back, rel=1e-5)


def test_options_are_for_divergences_of_other_distributions():
    with pytest.raises(ConfigError, match=r"^loss.options.beta: no such parameter of j"):
        divergence_of("jsd", options={"beta": 0.1})
    with pytest.raises(ConfigError, match=r"^loss.divergence: 'kl' is no divergence that is inst"):
        divergence_of("kl")


@pytest.mark.parametrize("name", NAMES)
def test_buckets_that_one_side_lacks_cost_what_the_formula_says(name):
    # The teacher lacks the second bucket, the student the third; the fourth, a filler, lacks both.
    p = torch.tensor([[0.75, 0.0, 0.25, 0.0, 0.0]])
    log_q = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]]).log()
    value, slope = divergence_of(name).terms(Buckets.of(p, log_q))
    assert (value >= 0).all()
    assert slope.isfinite().all()
    assert value[0, 3:].abs().max() == slope[0, 3:].abs().max() == 0
    infinite = name in ("forward_kl", "adaptive_kl")
    assert value[0, 2].isinf() == infinite
    assert value[0, :2].isfinite().all()
    if name == "reverse_kl":
        assert value[0, 1] == pytest.approx(0.5 * (math.log(0.5) + 87.3365) - 0.5)


def test_the_adaptive_head_is_the_fewest_most_probable_that_reach_the_mass():
    p = torch.tensor([[0.2, 0.4, 0.3, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.3, 0.1, 0.1, 0.5]], dtype=torch.float64)
    both = Buckets.of(p, q.log())
    gaps = [0.1, 0.3, 0.2, 0.4]
    for head_mass, head in ((0.3, [1]), (0.5, [1, 2]), (0.65, [1, 2]), (0.75, [0, 1, 2])):
        expected = sum(gaps[i] for i in head) / sum(gaps)
        assert float(head_weight(both, head_mass)) == pytest.approx(expected), head_mass
    # A tail heavier than every listed id is tail all the same.
    assert float(head_weight(Buckets.of(p.flip(1)[:, [0, 3, 1, 2]], q.log()), 0.05)) < 1


def test_excess_and_mixture_keep_their_digits_near_zero_and_far_away():
    a = torch.full((5,), 0.3)
    d = torch.tensor([1e-6, -1e-6, 1e-3, -0.3, 40.0])
    wide = d.double()
    found = kl_terms(a, a * d.exp(), d)
    torch.testing.assert_close(
        found.double(), a.double() * (torch.expm1(wide) - wide), rtol=2e-4, atol=0
    )
    d = torch.tensor([1e-6, -1e-6, 300.0, -300.0, torch.inf, -torch.inf])
    log = math.log
    expected = torch.tensor([0.9e-6, -0.9e-6, 300 + log(0.9), log(0.1), torch.inf, log(0.1)])
    torch.testing.assert_close(log_mixture_ratio(d, 0.1), expected, rtol=1e-5, atol=0)
