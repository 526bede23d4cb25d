"""Saving and stopping: when checkpoints are written, and what a stopped run leaves.

A checkpoint is due every train.save_every steps, at the last step, at a new lowest loss with
train.keep_best, and when train.save_minutes have passed since the last one by rank 0's clock. When
a checkpoint is written changes nothing in what is trained.

All ranks learn of both, and of a stop, in one small collective at the beginning of a step, before
they wait for data or a teacher. A stop leaves the step before it done, and an evaluation undone. It
is saved if the last save's time fits what is left of the 15 s (`parallel.watchdog`); before the
first save, the ranks try. One line says what is saved, also when the process is ended in the middle
of a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from megadistill.parallel import Stop
from megadistill.train import checkpoint
from megadistill.train.checkpoint import Position

if TYPE_CHECKING:
    from megadistill.train.run import Run
    from megadistill.train.student_engine import Trainer

log = logging.getLogger(__name__)


class Flags(NamedTuple):
    """Flags of one rank at the beginning of a step, as numbers to be summed over the ranks."""

    stop: float  # a stop is requested
    save: float  # train.save_minutes have passed; rank 0 alone
    lost: float  # another process has taken the folder's lock; rank 0 alone


class Standing:
    """The last finished and the last saved step. The watchdog's thread reads them as well."""

    def __init__(self, *, step: int, steps: int) -> None:
        self.step, self.steps = step, steps
        self._saved = self._saved_before = step
        self._sealed: Callable[[], bool] = lambda: True

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint that is whole; 0 without one."""
        return self._saved if self._sealed() else self._saved_before

    def save(self, step: int, sealed: Callable[[], bool]) -> None:
        """Records a checkpoint of `step`: written, or written once sealed() is True."""
        self._saved, self._saved_before, self._sealed = step, self.saved, sealed

    def account(self) -> str:
        """Returns a line that says where a run that ends here resumes."""
        done = f"stopped after step {self.step} of {self.steps}"
        if not self.saved:
            return f"{done}, no checkpoint yet: the same command starts at step 1"
        if self.step == self.steps == self.saved:
            return f"{done}, before the model was exported: the same command exports it"
        return f"{done}; last checkpoint: step {self.saved}; the same command resumes there"


class Saving:
    """The checkpoints of one run in one process group. Methods but `flags` are collective."""

    def __init__(
        self,
        run: Run,
        trainer: Trainer,
        standing: Standing,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.standing = standing
        self._run, self._trainer, self._clock = run, trainer, clock
        self._newest = standing.saved  # the same on all ranks
        self._saved_at = clock()
        self._took_s: float | None = None  # the last save in this process

    def flags(self, stop: Stop) -> Flags:
        """Returns the flags of this rank at the beginning of a step."""
        minutes = self._run.config.train.save_minutes
        rank_0 = self._trainer.mesh.rank == 0
        passed = rank_0 and minutes and self._clock() - self._saved_at >= 60 * minutes
        return Flags(
            float(stop.requested), float(bool(passed)), float(not self._run.folder.is_ours())
        )

    def due(self, step: int, *, asked: bool) -> bool:
        """Whether a checkpoint follows `step`. asked: the sum of `Flags.save` was not 0."""
        train = self._run.config.train
        by_steps = train.save_every is not None and step % train.save_every == 0
        return asked or by_steps or step == self._run.steps

    def save(self, position: Position, metrics: dict[str, float] | None) -> None:
        """Writes a checkpoint of this step, with its evaluation if there is one."""
        train, background = self._run.config.train, self._trainer.background
        began = self._clock()
        checkpoint.save(
            self._trainer,
            self._run.folder.checkpoints,
            position,
            keep=train.keep,
            keep_best=train.keep_best,
            metrics=metrics,
            guard=self._run.folder.require_lock,
        )
        self._saved_at = self._clock()
        self._took_s = self._saved_at - began
        self._newest = position.step
        self.standing.save(
            position.step, (lambda: True) if background is None else background.sealed()
        )

    def finish(self, position: Position, stop: Stop, *, complete: bool) -> None:
        """Saves the last step after the last step or a stop, if it is unsaved and time allows."""
        mesh, background = self._trainer.mesh, self._trainer.background
        if not complete:
            stop.wait(2.0)  # it may have been asked of another rank, and come here in a moment
        if self._newest < position.step and mesh.run_on_rank0(lambda: self._fits(stop)):
            self.save(position, None)
        if background is not None:
            background.wait()
        if not complete and mesh.rank == 0:
            log.info("%s", self._last_line(position, stop))

    def _fits(self, stop: Stop) -> bool:
        """Whether a save fits the time before the process is ended, judged by the last save."""
        background = self._trainer.background
        took_s = self._took_s if background is None else background.took_s
        return took_s is None or took_s <= stop.left_s

    def _last_line(self, position: Position, stop: Stop) -> str:
        if self.standing.saved == position.step:
            steps = self._run.steps
            return (
                f"stopped at step {position.step} of {steps}: saved; the same command resumes there"
            )
        took_s, left_s = self._took_s or 0.0, max(0.0, stop.left_s)
        return f"{self.standing.account()} (a save takes {took_s:.1f} s, {left_s:.1f} s were left)"
