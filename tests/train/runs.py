"""What training tests run on ranks. Results are plain numbers and arrays: they cross processes."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch

from megadistill import parallel  # noqa: F401 - before deepspeed
from megadistill.errors import MegadistillError
from megadistill.train.data import micro_batch
from megadistill.train.evaluate import open_evaluation
from megadistill.train.export import gathered
from megadistill.train.loop import train
from megadistill.train.run import build, prepare
from tests.allocation import AllocationWatch
from tests.models import tiny_llama


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
    evaluation = open_evaluation(config.eval.cache, max_sequences=config.eval.max_sequences)
    return evaluation.run(trainer, micro_batch_size=config.train.micro_batch, pack="isolate")


def same_random_states(mesh, seed):
    torch.manual_seed(seed)
    return np.asarray(torch.rand(3))


def make_wide_model(path):
    return tiny_llama(path, vocab_size=997, hidden_size=16, intermediate_size=16)
