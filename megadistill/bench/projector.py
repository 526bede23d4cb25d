"""The projector against the way over the teacher's probabilities and embeddings.

map     what leads from the teacher's last hidden states to the student's space: ours one product
        with P, the naive way softmax(t U') U and then P, its probabilities given
scored  the map, the student's head and the loss, forward and backward, of all learned matrices and
        the student's hidden states; the naive way again with its probabilities given
whole   the same with what makes those probabilities: the teacher's head and a softmax

Both sides have the same head and loss, ours (student/head.py), so they differ in the map alone.

Predicted from the products: map 1 + V / S, 149 for V = 152,000 and S = 1,024; scored 1 + V H over
6 products of the student's head, 2.7 where that has 30,400 tokens, and 1.3 where it has 152,000.
Found on two quiet cores, 256 positions, H = 2,048, 15 rounds, least and most behind:

student's tokens   map               scored               whole
30,400             144 (90 to 163)   1.98 (1.36 to 2.54)  2.96 (2.09 to 4.08)
152,000            147 (83 to 279)   1.25 (1.09 to 1.37)  1.43 (1.30 to 2.10)

Ours takes 1.22 and 5.9 s. It took 1.56 and 9.6 s when a divergence of whole distributions went
through all columns at once, thirty times through memory, and the teacher's side of the head through
13 rows at a time (student/loss/dense_divergence.py, targets/dense.py).

Shapes: N positions, V and H the teacher's vocabulary and width, S the student's width.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megadistill.bench.rounds import ratio, take_turns
from megadistill.student.head import DistillationHead
from megadistill.student.projection import Projector
from megadistill.targets.projected import ProjectedTargets


@dataclass(frozen=True)
class ProjectorSizes:
    """Sizes of the two models; positions: of a micro-batch."""

    positions: int = 256
    vocab: int = 152_000
    hidden: int = 2048
    student_vocab: int = 30_400
    student_hidden: int = 1024


class Problem:
    """Random states and matrices of such sizes."""

    def __init__(self, sizes: ProjectorSizes) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return scale * torch.randn(*shape, generator=generator)

        N, H, S = sizes.positions, sizes.hidden, sizes.student_hidden
        self.teacher_NH = random(N, H)
        self.embeddings_VH = random(sizes.vocab, H, scale=3 * H**-0.5)
        self.probs_NV = self.probabilities()
        self.student_NS = random(N, S).requires_grad_()
        self.labels_N = torch.randint(sizes.student_vocab, (N,), generator=generator)
        self.has_N = torch.ones(N, dtype=torch.bool)
        self.projector = Projector(H, S)
        linear = torch.nn.Linear(S, sizes.student_vocab, bias=False)
        with torch.no_grad():
            linear.weight.copy_(random(sizes.student_vocab, S, scale=3 * S**-0.5))
        self.head = DistillationHead(linear)

    def probabilities(self) -> torch.Tensor:
        """[N, V], the teacher's."""
        return (self.teacher_NH @ self.embeddings_VH.T).softmax(1)

    def over_embeddings(self, probs_NV: torch.Tensor) -> torch.Tensor:
        """[N, H]: the teacher's embeddings, averaged by its probabilities."""
        return probs_NV @ self.embeddings_VH

    def score(self, states_NH: torch.Tensor) -> None:
        """Projector, head and loss, forward and backward."""
        targets = ProjectedTargets(states_NH, self.has_N).through(self.projector)
        self.head(self.student_NS, self.labels_N, targets, ce_weight=1.0).loss.backward()

    def forget(self) -> None:
        self.student_NS.grad = None
        self.projector.zero_grad()
        self.head.zero_grad()

    @property
    def ways(self) -> dict[str, Callable[[], Any]]:
        """Returns the measured functions by name: ours, and the naive one of the same extent."""
        return {
            "map": lambda: self.projector(self.teacher_NH),
            "naive_map": lambda: self.projector(self.over_embeddings(self.probs_NV)),
            "ours": lambda: self.score(self.teacher_NH),
            "naive_scored": lambda: self.score(self.over_embeddings(self.probs_NV)),
            "naive_whole": lambda: self.score(self.over_embeddings(self.probabilities())),
        }


def projector_cost(sizes: ProjectorSizes, *, rounds: int) -> dict[str, Any]:
    """Medians of `rounds` rounds in which all take turns, in seconds and as ratios over ours."""
    problem = Problem(sizes)
    seconds = take_turns(problem.ways, rounds=rounds, before=problem.forget)
    return {
        "data": f"{sizes.positions} positions, teacher {sizes.vocab:,} x {sizes.hidden}, student "
        f"{sizes.student_vocab:,} x {sizes.student_hidden}",
        "rounds": rounds,
        **{f"{name}_s": statistics.median(taken) for name, taken in seconds.items()},
        **ratio(seconds["naive_map"], seconds["map"], name="map"),
        **ratio(seconds["naive_scored"], seconds["ours"], name="scored"),
        **ratio(seconds["naive_whole"], seconds["ours"], name="whole"),
    }
