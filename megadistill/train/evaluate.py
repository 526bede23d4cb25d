"""Held-out evaluation against a topk or topp cache.

loss            mean -log q(true next token), nats; the usual language-model loss
perplexity      exp(loss)
kl              mean KL(teacher || student), nats, over the listed ids and the tail as one bucket:
                a lower bound of the full KL, above it only by what the tail hides within itself
top1_agreement  share of positions where student and teacher find the same id most probable
calibration_error  mean gap between the student's top-1 probability and the share of positions where
                that id is the true next token, over 15 bins (student/calibration.py)
teacher_loss    the same as loss for the teacher, from the cache, where it holds nll
teacher_entropy mean entropy of the teacher, from the cache, where it holds it

Temperature is the cache's for kl, 1 for loss and calibration_error. Never weighted, smoothed or
multiplied by T squared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from megadistill.blocks.remote.shard_cache import LocalCopies
from megadistill.errors import ConfigError, DataError
from megadistill.models.packed_sequences import IGNORED, sample_labels
from megadistill.student.calibration import BINS, calibration_error
from megadistill.targets import SparseTargets, find_method
from megadistill.train.student_engine import Trainer
from megadistill.train.training_source import MicroBatch, micro_batch, open_sequences


class Evaluation:
    """Held-out cache, opened once, with the sums that do not depend on the student."""

    def __init__(
        self,
        path: str,
        *,
        max_sequences: int | None,
        local: LocalCopies | None = None,
        key: str = "eval.cache",
    ) -> None:
        opened = open_sequences(path, key=key, with_targets=True, local=local)
        self.sequences = replace(opened, key=key)
        method = self.sequences.recipe["method"]
        if find_method(method).sampled:
            raise ConfigError(
                f"{key}: {self.sequences.name} holds {method} targets, expected topk: "
                "single samples say little about a held-out distribution; generate with "
                "targets.method=topk"
            )
        self.temperature = float(self.sequences.recipe["temperature"])
        self.count = min(len(self.sequences), max_sequences or len(self.sequences))

    def require_labels(self) -> None:
        """Raises DataError if no evaluated sequence has a label with a target."""
        for i in range(self.count):
            sample = self.sequences[i]
            if ((sample_labels(sample) != IGNORED) & (sample["targets"].counts > 0)).any():
                return
        raise DataError(
            f"{self.sequences.key}: {self.sequences.name}: there is nothing to evaluate, no label "
            f"of its first {self.count} sequence(s) has a target: check the loss mask and "
            "targets.positions of that text, and generate it again"
        )

    @torch.no_grad()
    def run(
        self,
        trainer: Trainer,
        *,
        micro_batch_size: int,
        pack: Any,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Returns the metrics of the current student; None if any rank requests a stop meanwhile.

        Collective: ranks run equally many forwards.
        """
        trainer.engine.eval()
        mesh, rows = trainer.mesh, micro_batch_size
        sums = torch.zeros(8, dtype=torch.float64)
        calibration_M3 = torch.zeros(BINS, 3, dtype=torch.float64)
        for start in range(0, self.count, rows * mesh.world):
            if mesh.sum(torch.tensor(float(stop_requested()))):
                trainer.engine.train()
                return None
            mine = np.arange(start + mesh.rank * rows, start + (mesh.rank + 1) * rows)
            names = [(0, int(i)) for i in np.minimum(mine, self.count - 1)]
            batch = micro_batch(
                [self.sequences], names, with_targets=True, empty=int((mine >= self.count).sum())
            )
            moved = batch.on(trainer.student.model, mesh.device, pack=pack)
            options = {"temperature": self.temperature, "agreement": True, "calibration": True}
            terms = trainer.engine(moved.labels_N, moved.targets, options, **moved.inputs)
            sums[:5] += torch.tensor(
                [terms.kd_sum, terms.ce_sum, terms.agreed, terms.kd_count, terms.ce_count],
                dtype=torch.float64,
            )
            sums[5:] += _teacher(batch)
            calibration_M3 += terms.calibration_M3.cpu()
        trainer.engine.train()
        kd, ce, agreed, kd_count, ce_count, nll, entropy, known = mesh.sum(sums).tolist()
        loss = ce / max(ce_count, 1)
        figures = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "kl": kd / max(kd_count, 1),
            "top1_agreement": agreed / max(kd_count, 1),
            "calibration_error": calibration_error(mesh.sum(calibration_M3)),
            "positions": int(ce_count),
            "sequences": self.count,
        }
        if known:
            figures |= {"teacher_loss": nll / known, "teacher_entropy": entropy / known}
        return figures


def _teacher(batch: MicroBatch) -> torch.Tensor:
    """Sums of the teacher's nll and entropy over the valid positions, and their number."""
    targets = cast(SparseTargets, batch.targets)  # a single cache's
    if targets.nll is None or targets.entropy is None:
        return torch.zeros(3, dtype=torch.float64)
    valid_N = (batch.labels_N != -100) & (targets.counts > 0)
    notes = [targets.nll[valid_N], targets.entropy[valid_N], valid_N]
    return torch.tensor([note.sum(dtype=np.float64) for note in notes], dtype=torch.float64)


def open_evaluation(
    asked: tuple[str, str] | None, *, max_sequences: int | None, local: LocalCopies | None = None
) -> Evaluation | None:
    """Opens the held-out cache; None without one. asked: the key, and the folder or URL."""
    if asked is None:
        return None
    key, path = asked
    return Evaluation(path, max_sequences=max_sequences, local=local, key=key)
