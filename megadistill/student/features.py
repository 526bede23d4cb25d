"""Features: the student's hidden states and attention, drawn to those of its teacher.

Of each pair of layers, one of the teacher and one of the student, a position adds

hidden     mse: |P s - t|^2 / |t|^2, the mean squared error over the mean square of the teacher's
           state; cosine: 1 - cos(P s, t)
attention  sum over earlier positions of p (log p - log q) - p + q, with p and q the attention of
           teacher and student, averaged over their heads, which may be unequal in number (the
           divergence of MiniLM, arXiv 2002.10957)

P is learned, one matrix a pair, and leads from the student's width to the teacher's (as in
TinyBERT, arXiv 1909.10351). The other way round, a P of zeros and a student that says nothing would
agree. The matrices are parameters of the student's engine: partitioned, clipped, averaged, saved
and resumed with it; the export leaves them out.

Both hidden losses are near 1 where the student says nothing, at any scale of the teacher's states,
so that hidden_weight means the same for every model. Each position is divided by its own square:
the states of a few tokens are a thousand times larger than the others' (massive activations, arXiv
2402.17762) and would be all that a plain or batch-wide MSE looks at. Nor does it depend on how
positions fall into micro-batches.

Only positions with a label count. Losses are means over pairs and sums over positions.

Shapes: B sequences, T positions, N = B*T, M of them with a label, S and H the widths of student and
teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from megadistill.config import Config
from megadistill.errors import ConfigError
from megadistill.models.documents_apart import carries_state
from megadistill.models.layers import Seen, layer_pairs
from megadistill.models.pretrained import model_settings
from megadistill.student.loss.terms import LossTerm

IGNORED = -100
_SMALLEST = 1e-12  # an attention, or a mean square, that is taken for none

HIDDEN = LossTerm("hidden", lambda loss: loss.hidden_weight)
ATTENTION = LossTerm("attention", lambda loss: loss.attention_weight)


class Features(NamedTuple):
    """Features of the teacher, one tensor for each pair of layers."""

    hidden: tuple[torch.Tensor, ...]  # [N, H]
    attention: tuple[torch.Tensor, ...]  # float32 [B, T, T], averaged over heads

    @classmethod
    def of(cls, seen: Seen, layers: dict[str, list[int]]) -> Features:
        """Returns the features of a teacher's watched layers, or of a rank's share of its heads."""
        return cls(
            tuple(seen.hidden[i].flatten(0, -2) for i in layers["hidden"]),
            tuple(mean_attention(seen.attention[i]) for i in layers["attention"]),
        )

    @classmethod
    def joined(cls, parts: list[Features]) -> Features:
        """Concatenates the features of several micro-batches."""
        hidden, attention = (
            tuple(torch.cat(each) for each in zip(*side, strict=True))
            for side in zip(*parts, strict=True)
        )
        return cls(hidden, attention)


@dataclass(frozen=True)
class FeaturePlan:
    """Which layers are aligned, (teacher's, student's) each, and how."""

    hidden: tuple[tuple[int, int], ...]
    attention: tuple[tuple[int, int], ...]
    loss: str  # mse, cosine
    teacher_width: int
    student_width: int
    learned: bool  # whether hidden states go through matrices

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """Returns the terms of the loss that have layers to align."""
        both = ((HIDDEN, self.hidden), (ATTENTION, self.attention))
        return tuple(term for term, pairs in both if pairs)

    @property
    def of_teacher(self) -> dict[str, list[int]]:
        """The teacher's layers to be watched."""
        return {"hidden": [t for t, _ in self.hidden], "attention": [t for t, _ in self.attention]}

    @property
    def of_student(self) -> dict[str, list[int]]:
        """The student's."""
        return {"hidden": [s for _, s in self.hidden], "attention": [s for _, s in self.attention]}


def feature_plan(config: Config, student: Any) -> FeaturePlan | None:
    """Returns which layers are to be aligned; None where the loss gives that no weight.

    student: its transformers configuration. ConfigError for layers that are not there, and for
    hidden states of different widths without matrices between them.
    """
    aligned = config.loss.aligned
    if not aligned:
        return None
    teacher = model_settings(config.teacher, key="teacher.model").get_text_config()
    student, features = student.get_text_config(), config.features
    for key, settings in (("teacher.model", teacher), ("student.model", student)):
        _check_not_apart(config, settings, key=key)
    pairs = {
        name: tuple(
            layer_pairs(
                getattr(features, f"{name}_layers"),
                teacher=teacher.num_hidden_layers,
                student=student.num_hidden_layers,
                key=f"features.{name}_layers",
            )
        )
        for name in aligned
    }
    widths = teacher.hidden_size, student.hidden_size
    if "hidden" in aligned and features.projection == "none" and widths[0] != widths[1]:
        raise ConfigError(
            f"features.projection: none, and the teacher's hidden states are {widths[0]} wide, the "
            f"student's {widths[1]}: set it to learned, or loss.hidden_weight=0"
        )
    learned = features.projection == "learned" or widths[0] != widths[1]
    return FeaturePlan(
        pairs.get("hidden", ()),
        pairs.get("attention", ()),
        features.hidden_loss,
        *widths,
        learned=learned,
    )


def _check_not_apart(config: Config, settings: Any, *, key: str) -> None:
    why = carries_state(vars(settings)) if config.data.pack == "isolate" else None
    if why is not None:
        weights = " ".join(f"loss.{name}_weight=0" for name in config.loss.aligned)
        raise ConfigError(
            f"features: {key} ({settings.model_type}) carries a state from token to token ({why}): "
            "under data.pack=isolate its documents run apart, and layers are not aligned: set "
            f"{weights}, or data.pack=concat"
        )


class FeatureAlignment(nn.Module):
    """The learned matrices, and the two losses."""

    def __init__(self, plan: FeaturePlan) -> None:
        super().__init__()
        self.plan = plan
        self.projections = nn.ModuleList(
            nn.Linear(plan.student_width, plan.teacher_width, bias=False)
            if plan.learned
            else nn.Identity()
            for _ in plan.hidden
        )

    def forward(
        self, seen: Seen, features: Features, labels_N: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """float32 sums over the positions with a label, by the name of the term."""
        kept = (labels_N != IGNORED).nonzero()[:, 0]
        hidden = attention = torch.zeros((), device=labels_N.device)
        for projection, (_, layer), teacher_NH in zip(
            self.projections, self.plan.hidden, features.hidden, strict=True
        ):
            student_MS = seen.hidden[layer].flatten(0, -2)[kept]
            values_M = hidden_loss(projection(student_MS), teacher_NH[kept], self.plan.loss)
            hidden = hidden + values_M.sum() / len(self.plan.hidden)
        for (_, layer), teacher_BTT in zip(self.plan.attention, features.attention, strict=True):
            student_BTT = mean_attention(seen.attention[layer])
            p_MT, q_MT = (each.flatten(0, 1)[kept] for each in (teacher_BTT, student_BTT))
            attention = attention + attention_loss(p_MT, q_MT).sum() / len(self.plan.attention)
        sums = {HIDDEN.name: hidden, ATTENTION.name: attention}
        return {term.name: sums[term.name] for term in self.plan.terms}

    def initial(self, seed: int) -> dict[str, torch.Tensor]:
        """Normal matrices that keep a vector's length on average, equal at every rank count."""
        generator = torch.Generator().manual_seed(seed)
        plan = self.plan
        if not plan.learned:
            return {}
        scale = plan.student_width**-0.5
        return {
            f"projections.{i}.weight": scale
            * torch.randn(plan.teacher_width, plan.student_width, generator=generator)
            for i in range(len(plan.hidden))
        }


def hidden_loss(student_MH: torch.Tensor, teacher_MH: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 [M], at least 0; 1 for a student's state of zeros by mse. kind: mse, cosine."""
    student_MH, teacher_MH = student_MH.float(), teacher_MH.float()
    if kind == "cosine":
        return 1 - nn.functional.cosine_similarity(student_MH, teacher_MH, dim=1)
    error_M = (student_MH - teacher_MH).square().mean(1)
    return error_M / teacher_MH.square().mean(1).clamp_min(_SMALLEST)


def attention_loss(p_MT: torch.Tensor, q_MT: torch.Tensor) -> torch.Tensor:
    """float32 [M], at least 0: a sum of terms that each are.

    Rows need not sum to 1: with attention sinks (gpt-oss) they do not.
    """
    q_MT = q_MT.clamp_min(_SMALLEST)
    return (p_MT * (p_MT.clamp_min(_SMALLEST).log() - q_MT.log()) - p_MT + q_MT).sum(1)


def mean_attention(weights: torch.Tensor) -> torch.Tensor:
    """float32 [B, T, T] of [B, heads, T, T]."""
    return weights.mean(1, dtype=torch.float32)
