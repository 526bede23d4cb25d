"""Policy for a loss or a gradient that is not finite.

A micro-batch whose loss is not finite gets gradients that are not (engine.py), and the norm of the
gradient, which every rank knows, is taken before the optimizer updates anything: so one such number
on one rank keeps all of them from updating. Here it is decided what follows:

    stop   the run ends with an error that names the sequences (the default)
    skip   the step is left out, on all ranks: no weight, moment or average changes. It counts as a
           step, and its sequences as consumed. More than train.skip_budget of them over the whole
           run, resumes included, stop it

Nothing is zeroed or clipped to make it finite. What float16's loss scaler makes overflow is the
scaler's to find out, and no concern of this policy while the losses are finite.
"""

from __future__ import annotations

import logging

from megadistill.config import TrainConfig
from megadistill.errors import TrainError
from megadistill.parallel import Mesh
from megadistill.train.training_source import MicroBatch, TrainingSource

log = logging.getLogger(__name__)


class NonFinite:
    """The policy, and how often it had to skip."""

    def __init__(
        self, config: TrainConfig, mesh: Mesh, stores: list[TrainingSource], *, skipped: int
    ) -> None:
        self._config, self._mesh, self._stores = config, mesh, stores
        self.skipped = skipped

    def handle(
        self, step: int, micro_batches: list[MicroBatch], suspects: list[MicroBatch]
    ) -> None:
        """Step number `step`, from 1, had a loss or gradient that is not finite. Collective.

        share: this rank's micro-batches; suspects: those of them with a loss that is not finite.
        TrainError where the policy, or its budget, says so.
        """
        everyone = self._mesh.gather([_names(micro_batches), _names(suspects)])
        of_losses = [name for _, names in everyone for name in names]
        what = "a loss is not finite" if of_losses else "the gradient is not finite"
        where = self._named(of_losses or [name for names, _ in everyone for name in names])
        line = f"step {step}: {what}; among sequences {where}"
        if self._config.non_finite == "stop":
            raise TrainError(
                f"{line}: nothing was saved after the last checkpoint; lower train.lr, look at "
                "these sequences, or leave such steps out by train.non_finite=skip"
            )
        self.skipped += 1
        if self.skipped > self._config.skip_budget:
            raise TrainError(
                f"{line}: it is step number {self.skipped} to be skipped, and train.skip_budget is "
                f"{self._config.skip_budget}: lower train.lr, look at these sequences, or raise "
                "the budget"
            )
        if self._mesh.rank == 0:
            log.warning("%s: skipped, %d of %d", line, self.skipped, self._config.skip_budget)

    def _named(self, names: list[tuple[int, int]]) -> str:
        return " and ".join(
            f"{', '.join(str(store.number(i)) for k, i in sorted(names) if k == number)} of "
            f"{store.name}"
            for number, store in enumerate(self._stores)
            if any(k == number for k, _ in names)
        )


def _names(batches: list[MicroBatch]) -> list[tuple[int, int]]:
    return [name for batch in batches for name in batch.names]
