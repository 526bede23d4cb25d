"""Policy for a loss or a gradient that is not finite.

A micro-batch with a non-finite loss gets non-finite gradients (student_engine.py). Every rank knows
the norm of the gradient before the optimizer updates anything, so one such number on one rank keeps
all ranks from updating. The policy decides what follows:

    stop   the run ends with an error that names the sequences (the default)
    skip   the step is left out, on all ranks: no weight, moment or average changes. It counts as a
           step, and its sequences as consumed. More than train.skip_budget of them over the whole
           run, resumes included, stop it

Nothing is zeroed or clipped to make it finite. Overflows that float16's loss scaler causes are left
to the scaler while the losses are finite.
"""

from __future__ import annotations

import logging

from megadistill.config import TrainConfig
from megadistill.errors import TrainError
from megadistill.parallel import Mesh
from megadistill.train.training_source import MicroBatch, TrainingSource

log = logging.getLogger(__name__)


class NonFinite:
    """The policy, with the number of skipped steps."""

    def __init__(
        self, config: TrainConfig, mesh: Mesh, stores: list[TrainingSource], *, skipped: int
    ) -> None:
        self._config, self._mesh, self._stores = config, mesh, stores
        self.skipped = skipped

    def handle(
        self, step: int, micro_batches: list[MicroBatch], suspects: list[MicroBatch]
    ) -> None:
        """Handles a non-finite loss or gradient at step number `step`, from 1. Collective.

        micro_batches: of this rank; suspects: those of them with a non-finite loss. Raises
        TrainError if the policy says stop, or if its budget is used up.
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
