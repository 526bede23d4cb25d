"""Training a student: from a configuration to a folder with metrics, checkpoints and a model.

    check everything that needs no model -> load, or resume -> steps -> checkpoint -> export

A step is one global batch. Each rank runs its micro-batches, every loss a sum divided by the valid
positions of the whole batch, which are counted before the first of them; gradients add up to those
of the one batch. All ranks decide together whether to continue: a stop that one rank is asked for
(stopping.py), or a number that is not finite on one (nonfinite.py), holds for all.

Shapes: none; positions and sequences are counted.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megadistill.config import Config, LossConfig
from megadistill.parallel import Mesh, Stop, accounted, graceful_stop
from megadistill.student.loss.terms import kl_of_step, report
from megadistill.train import checkpoint
from megadistill.train.batches import Batches
from megadistill.train.checkpoint import Checkpoint, Position
from megadistill.train.nonfinite import NonFinite
from megadistill.train.online.online_teacher import tokenise
from megadistill.train.optimizers import require_same_ranks
from megadistill.train.reporting.disk_errors import disk_errors
from megadistill.train.reporting.jsonl_log import read_records
from megadistill.train.reporting.metrics import Reporter
from megadistill.train.run import Run, build, finish, prepare
from megadistill.train.run_folder import run_identity
from megadistill.train.schedule import learning_rate
from megadistill.train.stopping import Flags, Saving, Standing
from megadistill.train.student_engine import Trainer
from megadistill.train.training_source import MicroBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """Result of a call of `train`."""

    steps: int  # of the whole run
    done: int  # by now; fewer than `steps` where it was stopped
    ran: int  # in this process
    out_dir: str
    code: int = 0  # for the process: that of the signal that stopped the run before its end


def train(config: Config, mesh: Mesh) -> Trained:
    """Train `config.student`, or resume the run in `train.out_dir`. Collective.

    Raises ConfigError, StoreError, TrainError before a model is loaded, LockedError while another
    process trains in the folder, TrainError for numbers that are not finite and for a full disk.
    On SIGINT, SIGTERM or SIGHUP it finishes the step, saves if that fits (stopping.py), and
    returns.
    """
    with disk_errors(config.train.out_dir):
        return _trained(config, mesh)


def _trained(config: Config, mesh: Mesh) -> Trained:
    if config.teacher.mode == "online":
        tokenise(config, mesh)
    run = prepare(config, mesh)
    config = run.config
    identity = run_identity(config, run.stores, run.steps)
    with contextlib.ExitStack() as held:  # rank 0 holds the folder's lock to the end
        claimed = mesh.run_on_rank0(lambda: run.folder.claim(identity, config, held))
        if claimed.finished:
            if mesh.rank == 0:
                log.info("%s: finished already, %d steps", run.folder.path, run.steps)
            return Trained(run.steps, run.steps, 0, config.train.out_dir)
        return _train(run, mesh, claimed.found)


def _train(run: Run, mesh: Mesh, found: Checkpoint | None) -> Trained:
    start = Position(0, 0, 0) if found is None else found.position
    if found is not None:
        require_same_ranks(run.config.train, found.path, written_by=found.world, world=mesh.world)
    standing = Standing(step=start.step, steps=run.steps)
    with accounted(standing.account):
        trainer = build(run, mesh)
        if found is not None:
            checkpoint.load(trainer, found)
            if mesh.rank == 0:
                log.info("resumed at step %d of %d from %s", start.step, run.steps, found.path)
        mesh.run_on_rank0(run.folder.require_lock)  # loading takes minutes
        reporter = None
        if mesh.rank == 0:
            reporter = Reporter(run.folder.path, run.config, done=start.step, steps=run.steps)
            if found is not None and (reached := reporter.metrics.reached) > start.step:
                log.info("steps %d to %d were not saved: done again", start.step + 1, reached)
        code = 0
        # Over the export as well: were the stop forgotten after the last step, one rank could
        # export while another one, signalled a moment later, leaves.
        with graceful_stop() as stop:
            saving = Saving(run, trainer, standing)
            with (
                reporter or contextlib.nullcontext(),
                trainer.background or contextlib.nullcontext(),
            ):
                end = run_steps(run, trainer, mesh, start, reporter, saving, stop)
            if end.complete:
                finish(run, trainer, mesh, end.metrics)
            else:
                code = max(mesh.gather(stop.code))
    step = end.position.step
    return Trained(run.steps, step, step - start.step, run.config.train.out_dir, code)


class Ended(NamedTuple):
    """Where the steps ended."""

    position: Position
    metrics: dict[str, float] | None  # of the last evaluation
    complete: bool  # False where a stop was requested before


def run_steps(
    run: Run,
    trainer: Trainer,
    mesh: Mesh,
    start: Position,
    reporter: Reporter | None,
    saving: Saving,
    stop: Stop,
) -> Ended:
    """Runs the steps from `start` on. Collective.

    Begins with the evaluation that a stop interrupted, if there is one.
    """
    position, metrics, complete = start, None, True
    policy = NonFinite(run.config.train, mesh, run.stores, skipped=start.skipped)
    lowest = mesh.run_on_rank0(lambda: checkpoint.lowest_loss(run.folder.checkpoints))
    owed = run.evaluates_after(start.step) and not mesh.run_on_rank0(
        lambda: _is_evaluated(run, start)
    )
    with run.batches(mesh, first=start.step) as batches:
        while complete and (owed or position.step < run.steps):
            asked = False
            if not owed:
                flags = saving.flags(stop)
                moved = run_step(run, trainer, batches, policy, position, reporter, flags)
                if moved is None:
                    complete = False
                    break
                position, asked = moved
                saving.standing.step = position.step
            best, evaluated = False, None
            if owed or run.evaluates_after(position.step):
                evaluated = evaluate(run, trainer, position, reporter, stop)
                complete = evaluated is not None
            if evaluated is not None:
                metrics = evaluated
                best = run.config.train.keep_best and metrics["loss"] < lowest
                lowest = min(lowest, metrics["loss"])
            if best or (not owed and complete and saving.due(position.step, asked=asked)):
                saving.save(position, evaluated)
            owed = False
    saving.finish(position, stop, complete=complete)
    return Ended(position, metrics, complete)


def _is_evaluated(run: Run, start: Position) -> bool:
    records = read_records(run.folder.path / "eval.jsonl")
    return bool(records) and records[-1]["step"] >= start.step


def run_step(
    run: Run,
    trainer: Trainer,
    batches: Batches,
    policy: NonFinite,
    position: Position,
    reporter: Reporter | None,
    flags: Flags,
) -> tuple[Position, bool] | None:
    """Runs the step after `position`. Returns the new position, and whether to save it. Collective.

    Returns None without a step if any rank is asked to stop. Raises LockedError on all ranks if
    another run has taken over the folder.
    """
    asked = Flags(*trainer.mesh.sum(torch.tensor(flags, dtype=torch.float64)).tolist())
    if asked.lost:
        trainer.mesh.run_on_rank0(run.folder.require_lock)
    if asked.stop:
        return None
    started = time.monotonic()
    micro_batches = next(batches)
    data_s, teacher_s = time.monotonic() - started, {}
    if trainer.teacher is not None:
        micro_batches = trainer.teacher.answer(micro_batches)
        teacher_s = {"teacher_s": time.monotonic() - started - data_s}
    counts = [
        sum(getattr(b, name) for b in micro_batches)
        for name in ("kd_count", "ce_count", "num_tokens", "kd_entropy")
    ]
    totals = trainer.mesh.sum(torch.tensor(counts, dtype=torch.float64)).tolist()
    kd_count, ce_count, num_tokens, kd_entropy = totals
    lr = learning_rate(position.step, run.steps, run.config.train)
    loss = run.config.loss.at(position.step / run.steps)
    sums = [
        _sums(trainer, batch, run, loss, (kd_count, ce_count), last=batch is micro_batches[-1])
        for batch in micro_batches
    ]
    names = [term.name for term in trainer.student.terms]
    summed = trainer.mesh.sum(torch.stack(sums).sum(0)).tolist()
    total = dict(zip(names, summed, strict=True))
    grad_norm = trainer.step(lr)
    counted = all(map(math.isfinite, summed))
    applied = counted and math.isfinite(grad_norm)
    if not applied and not (counted and trainer.scales_losses):
        suspects = [b for b, s in zip(micro_batches, sums, strict=True) if not s.isfinite().all()]
        policy.handle(position.step + 1, micro_batches, suspects)
    batch_size = run.config.train.global_batch
    tokens = int(num_tokens)
    position = Position(
        position.step + 1, position.sequences + batch_size, position.tokens + tokens, policy.skipped
    )
    if reporter is not None and run.folder.is_ours():  # else all ranks learn it in the next step
        seconds = time.monotonic() - started
        taught = run.stores[0].has_targets
        losses = report(
            trainer.student.terms, total, {"kd": kd_count if taught else None, "ce": ce_count}, loss
        )
        losses |= kl_of_step(loss, total, kd_entropy, kd_count if taught else 0)
        losses |= {"grad_norm": grad_norm}
        reporter.step(
            {
                "step": position.step,
                # JSON has no number that is not finite.
                **(losses if applied else {**dict.fromkeys(losses), "skipped": True}),
                **{name: getattr(loss, name) for name in run.config.loss.changes},
                "lr": lr,
                "sequences": position.sequences,
                "tokens": position.tokens,
                "tokens_per_s": tokens / seconds,
                "data_s": data_s,
                **teacher_s,
                "step_s": seconds,
                **trainer.readings.step(tokens=tokens, labels=ce_count, seconds=seconds),
            }
        )
    return position, bool(asked.save)


def evaluate(
    run: Run, trainer: Trainer, position: Position, reporter: Reporter | None, stop: Stop
) -> dict[str, float] | None:
    """Returns the held-out metrics of the current student; None after a stop. Collective."""
    assert run.evaluation is not None
    with trainer.evaluation_weights():
        metrics = run.evaluation.run(
            trainer,
            micro_batch_size=run.config.train.micro_batch,
            pack=run.config.data.pack,
            stop_requested=lambda: stop.requested,
        )
    if metrics is not None and reporter is not None and run.folder.is_ours():
        reporter.evaluation({"step": position.step, **metrics})
    return metrics


def _sums(
    trainer: Trainer,
    batch: MicroBatch,
    run: Run,
    loss: LossConfig,
    normalizer: tuple[float, float],
    *,
    last: bool,
) -> torch.Tensor:
    """float64, a sum for each of the student's terms; the micro-batch's gradients are added.

    On the host: each micro-batch waits here for its device, so that a loss that is not finite is
    known by its sequences.
    """
    moved = batch.on(trainer.student.model, trainer.mesh.device, pack=run.config.data.pack)
    sums = trainer.backward(moved, loss, normalizer, last=last).sums
    return torch.stack([sums[term.name] for term in trainer.student.terms]).cpu()
