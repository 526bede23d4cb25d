"""What training tests run on ranks. Results are plain numbers and arrays: they cross processes."""

import contextlib
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch

from megadistill import parallel  # noqa: F401 - before deepspeed
from megadistill.config.held_out import evaluation_cache
from megadistill.errors import MegadistillError
from megadistill.train import checkpoint
from megadistill.train.checkpoint import latest
from megadistill.train.evaluate import open_evaluation
from megadistill.train.export import gathered
from megadistill.train.loop import train
from megadistill.train.run import build, prepare
from megadistill.train.run_folder import run_identity
from megadistill.train.training_source import micro_batch
from tests.allocation import AllocationWatch
from tests.models.made import tiny_llama


def run(mesh, config):
    return train(config, mesh).done


def message(mesh, config):
    """The error that training ends with; its class and its one line."""
    try:
        train(config, mesh)
    except MegadistillError as error:
        return type(error).__name__, str(error)
    return "", "no error"


def run_until_told(mesh, config, lines):
    """Training that the last rank is told to stop (SIGTERM) after so many lines of metrics."""
    file = Path(config.train.out_dir) / "metrics.jsonl"

    def tell():
        while not file.exists() or len(file.read_text().splitlines()) < lines:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if mesh.rank == mesh.world - 1:
        threading.Thread(target=tell, daemon=True).start()
    return train(config, mesh).done


def run_and_lose_the_lock(mesh, config, lines):
    """Training whose lock another host takes after so many lines of metrics; how it ends."""
    from megadistill.train.reporting.metrics import Reporter

    out, step = Path(config.train.out_dir), Reporter.step

    def lose(self, record):
        step(self, record)
        if record["step"] == lines:
            other = {"nonce": "new", "host": "far", "pid": 7}
            (out / "run.lock").write_text(json.dumps(other))

    Reporter.step = lose
    try:
        return message(mesh, config)
    finally:
        Reporter.step = step


def run_and_be_stopped(mesh, config, step, number, save_s):
    """Training that gets a signal right after a step, and whose saves take `save_s`.

    Exit code, and what is logged of it; the time of a save is that of a clock which stands still
    otherwise.
    """
    from megadistill.parallel.ranks import _WATCHDOG
    from megadistill.train import stopping
    from megadistill.train.reporting.metrics import Reporter

    said, now = [], [0.0]
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    save, init, report = checkpoint.save, stopping.Saving.__init__, Reporter.step

    def slow_save(*arguments, **options):
        save(*arguments, **options)
        now[0] += save_s

    def with_our_clock(self, *arguments):
        init(self, *arguments, clock=lambda: now[0])

    def report_and_signal(self, record):
        report(self, record)
        if record["step"] == step:
            os.kill(os.getpid(), number)
            assert _WATCHDOG[0]._graceful.wait(20)

    log = logging.getLogger("megadistill.train")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    checkpoint.save, stopping.Saving.__init__ = slow_save, with_our_clock
    Reporter.step = report_and_signal
    try:
        return train(config, mesh).code, said
    finally:
        checkpoint.save, stopping.Saving.__init__, Reporter.step = save, init, report
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)


def weights(mesh, config):
    """The student's weights as they are dealt out, on rank 0."""
    trainer = build(prepare(config, mesh), mesh)
    return {name: value.numpy() for name, value in gathered(trainer.student, mesh).items()}


def logits_after_training(mesh, config):
    """The engine's logits on fixed tokens, and where the export of the same weights lies."""
    from megadistill.train.run import finish

    run = prepare(config, mesh)
    trainer = build(run, mesh)
    for step, names in enumerate([[(0, 0), (0, 1)], [(0, 2), (0, 3)]]):
        batch = micro_batch(run.stores, names, with_targets=True)
        moved = batch.on(trainer.student.model, mesh.device, pack="isolate")
        count = (batch.kd_count * mesh.world, batch.ce_count * mesh.world)
        trainer.backward(moved, config.loss, count, last=True)
        trainer.step(0.01 * (step + 1))
    run.folder.path.mkdir(parents=True, exist_ok=True)
    finish(run, trainer, mesh, None)
    trainer.engine.eval()
    with torch.no_grad():
        logits = trainer.engine(input_ids=torch.arange(12).reshape(2, 6)).logits
    return logits.numpy()


def largest_allocation(mesh, config):
    """Elements of the largest tensor that a training step's forward and backward make."""
    run = prepare(config, mesh)
    trainer = build(run, mesh)
    size = config.train.micro_batch
    batch = micro_batch(run.stores, [(0, i) for i in range(size)], with_targets=True)
    moved = batch.on(trainer.student.model, mesh.device, pack="isolate")
    with AllocationWatch() as watch:
        trainer.backward(moved, config.loss, (1.0, 1.0), last=True)
        trainer.step(1e-3)
    return watch.largest, watch.operation


def held_out(mesh, config):
    trainer = build(prepare(config, mesh), mesh)
    evaluation = open_evaluation(evaluation_cache(config), max_sequences=config.eval.max_sequences)
    return evaluation.run(trainer, micro_batch_size=config.train.micro_batch, pack="isolate")


def same_random_states(mesh, seed):
    torch.manual_seed(seed)
    return np.asarray(torch.rand(3))


def make_wide_model(path):
    return tiny_llama(path, vocab_size=997, hidden_size=16, intermediate_size=16)


def optimizer_loaded(mesh, config):
    """After resuming: weight decay of each group; step, and where it lies, of each sub-group."""
    run = prepare(config, mesh)
    trainer = build(run, mesh)
    checkpoint.load(trainer, mesh.run_on_rank0(lambda: latest(run.folder.checkpoints)))
    optimizer = trainer.engine.optimizer.optimizer
    steps = [state["step"] for state in optimizer.state.values()]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    return decays, [step.item() for step in steps], [step.data_ptr() for step in steps]


def gradient_of_an_infinite_loss(mesh, config):
    """Two steps, the second with a loss on rank 1 that float32 does not hold.

    For each: whether this rank's loss is finite, the head's gradient is, the weights changed.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    run = prepare(config, mesh)
    trainer = build(run, mesh)
    batch = micro_batch(run.stores, [(0, 0), (0, 1)], with_targets=True)
    moved = batch.on(trainer.student.model, mesh.device, pack="isolate")
    weight = trainer.student.head.weight
    found = []
    # A hundred nats by 1e-37 are too much for float32, and the elements of their gradient are not.
    for count in (1.0, 1e-37 if mesh.rank == 1 else 1.0):
        before = safe_get_full_fp32_param(weight).clone()
        loss = trainer.backward(moved, config.loss, (count, count), last=True).loss
        gradient = safe_get_full_grad(weight)
        trainer.step(1e-2)
        updated = not torch.equal(before, safe_get_full_fp32_param(weight))
        found.append((bool(loss.isfinite()), bool(gradient.isfinite().all()), updated))
    return found


def claimed(mesh, config):
    """A folder that a run has made its own, and no more."""
    run = prepare(config, mesh)
    with contextlib.ExitStack() as held:
        return run.folder.claim(run_identity(config, run.stores, run.steps), config, held).finished


def has_imported(mesh, name):
    import sys

    return name in sys.modules


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Inside, `count` adds up the bytes that autograd keeps, each storage once, without weights."""

    def __init__(self, model):
        self.count, self._seen, self._kept = 0, set(), []
        self._weights = {id(p) for p in model.parameters()}
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if id(tensor) not in self._weights and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._kept.append(storage)  # so that its place is nobody else's
            self.count += storage.nbytes()
        return tensor


def one_backward(mesh, config):
    """Loss, whole gradients by name, and the bytes that the forward kept, of one micro-batch."""
    from deepspeed.utils import safe_get_full_grad

    run = prepare(config, mesh)
    trainer = build(run, mesh)
    names = [(0, 2 * mesh.rank), (0, 2 * mesh.rank + 1)]
    batch = micro_batch(run.stores, names, with_targets=True)
    moved = batch.on(trainer.student.model, mesh.device, pack="isolate")
    with SavedBytes(trainer.student) as saved:
        loss = trainer.backward(moved, config.loss, (30.0, 30.0), last=True).loss
    gradients = {
        n: safe_get_full_grad(p).numpy().copy() for n, p in trainer.student.named_parameters()
    }
    return float(loss.detach()), gradients, saved.count


def half_precision(mesh, config, steps, *, resume=False):
    """Training in float16 on a CPU, which is refused to users: slow, and no test of a GPU's.

    For each step the loss scale before it and the norm of the gradient; saves after the last.
    """
    from dataclasses import replace

    from deepspeed.accelerator import get_accelerator

    plain = config.model_copy(update={"deepspeed": {}})
    run = replace(prepare(plain, mesh), config=config)
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    try:
        trainer = build(run, mesh)
    finally:
        del accelerator.is_fp16_supported
    position = checkpoint.Position(0, 0, 0)
    if resume:
        found = mesh.run_on_rank0(lambda: latest(run.folder.checkpoints))
        checkpoint.load(trainer, found)
        position = found.position
    seen, pairs = [], 2 // mesh.world  # four sequences a step, two at a time
    for step in range(position.step, position.step + steps):
        scale = trainer.engine.optimizer.loss_scaler.cur_scale
        for pair in range(pairs * mesh.rank, pairs * (mesh.rank + 1)):
            names = [(0, 4 * step + 2 * pair), (0, 4 * step + 2 * pair + 1)]
            batch = micro_batch(run.stores, names, with_targets=True)
            moved = batch.on(trainer.student.model, mesh.device, pack="isolate")
            last = pair == pairs * (mesh.rank + 1) - 1
            trainer.backward(moved, config.loss, (50.0, 50.0), last=last)
        seen.append((scale, trainer.step(1e-3)))
    checkpoint.save(
        trainer, run.folder.checkpoints, checkpoint.Position(position.step + steps, 0, 0), keep=9
    )
    scaler = trainer.engine.optimizer.loss_scaler
    state = {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)}
    return seen, state, trainer.scales_losses


def run_with_slow_saves(mesh, config, lines):
    """Training whose first checkpoint cannot be written before so many lines of metrics are."""
    from megadistill.train.checkpoint import background

    file, written, write = Path(config.train.out_dir) / "metrics.jsonl", [], background._written

    def wait(files):
        if not written:
            written.append(True)
            until = time.monotonic() + 60
            while len(file.read_text().splitlines()) < lines and time.monotonic() < until:
                time.sleep(0.01)
            named = len(checkpoint.checkpoints(file.parent / "checkpoints"))
            written.append((len(file.read_text().splitlines()), named))
        return write(files)

    background._written = wait
    try:
        train(config, mesh)
    finally:
        background._written = write
    return written[1]


def run_with_a_full_disk(mesh, config):
    """Training of which rank 1's second checkpoint cannot be written; how it ends."""
    from megadistill.errors import StoreError
    from megadistill.train.checkpoint import background

    write, calls = background._written, []

    def fail(files):
        calls.append(1)
        if mesh.rank == 1 and len(calls) == 2:
            return str(StoreError(f"{files[0][0]}: cannot write: No space left on device"))
        return write(files)

    background._written = fail
    try:
        return message(mesh, config)
    finally:
        background._written = write


def half_precision_in_vain(mesh, config):
    """The error that float16 ends with where its scale cannot come down as far as it must."""
    try:
        half_precision(mesh, config, 4)
    except MegadistillError as error:
        return str(error)
    return "no error"
