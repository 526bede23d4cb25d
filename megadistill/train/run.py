"""Preparing, building and finishing a run: everything before its first step and after its last.

`prepare` checks stores, folders and settings without loading a model. `build` loads the models and
runs the checks that need them. `finish` exports.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megadistill.cache.recorded_settings import check_known, other_targets, with_known
from megadistill.config import ALL_TERMS_FROM, FEATURES_FROM, Config
from megadistill.data.order import Order
from megadistill.models.attention import check_isolation
from megadistill.models.documents_apart import log_apart
from megadistill.models.pretrained import backbone, model_settings
from megadistill.parallel import Mesh, Unjoined
from megadistill.student.features import FeaturePlan, feature_plan
from megadistill.student.model import load_student
from megadistill.targets import find_method
from megadistill.train import checkpoint
from megadistill.train.batches import Batches
from megadistill.train.evaluate import Evaluation
from megadistill.train.export import export, model_card, student_tokenizer
from megadistill.train.online.online_teacher import OnlineTeacher, open_online
from megadistill.train.online.projected_teacher import begin_projection
from megadistill.train.own_files import own_files
from megadistill.train.reporting.jsonl_log import read_records
from megadistill.train.run_checks import check_settings, check_student, open_held_out
from megadistill.train.run_folder import RunFolder
from megadistill.train.student_engine import Trainer, deepspeed_config
from megadistill.train.teachers import (
    check_divergences,
    describe_teachers,
    load_online,
    with_caches,
    with_models,
)
from megadistill.train.training_source import (
    TrainingSource,
    blocks_there,
    open_sources,
    require_targets,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Holds what is settled before a model is loaded."""

    config: Config
    stores: list[TrainingSource]
    order: Order
    evaluation: Evaluation | None
    folder: RunFolder
    steps: int
    vocab_size: int  # of data, teachers and the student's tokenizer; its rows above are padding
    features: FeaturePlan | None = None  # to be aligned with an online teacher
    projected_width: int | None = None  # of a teacher whose hidden states are projected

    def evaluates_after(self, step: int) -> bool:
        """Whether a held-out evaluation follows a step."""
        every = self.config.train.eval_every
        due = step == self.steps or (every is not None and step % every == 0)
        return self.evaluation is not None and step > 0 and due

    def batches(self, mesh: Mesh, *, first: int = 0) -> Batches:
        """Returns this rank's micro-batches of each step, from step `first` on."""
        return Batches(
            self.stores,
            self.order,
            rank=mesh.rank,
            world=mesh.world,
            micro_batch=self.config.train.micro_batch,
            with_targets=self.stores[0].reads_targets,
            first=first,
            last=self.steps,
        )


def prepare(config: Config, mesh: Mesh | Unjoined) -> Run:
    """Runs every check that needs no model. Writes nothing."""
    check_settings(config, mesh)
    folder = RunFolder(config.train.out_dir)
    config, stores = _open_stores(config, folder, mesh)
    store = stores[0]
    for each in stores:
        if each.has_targets:
            check_divergences(config, each)
    mesh.run_on_rank0(lambda: require_targets(config, stores))
    _log_curriculum(config, mesh)
    evaluation = open_held_out(config, mesh, store, stores)
    student, vocab_size = check_student(config, mesh, store, evaluation)
    order = Order(
        [len(s) for s in stores],
        block_size=[s.store.block_size for s in stores],
        weights=[s.weight for s in stores],
        global_batch=config.train.global_batch,
        seed=config.order.seed,
        groups=config.order.groups,
        shuffle=config.order.shuffle,
    )
    steps = config.train.steps or math.ceil(
        (config.train.epochs or 1) * order.num_sequences / config.train.global_batch
    )
    width = None
    if find_method(config.targets.method).own_tokenizer:
        width = model_settings(config.teacher, key="teacher.model").get_text_config().hidden_size
    return Run(
        config,
        stores,
        order,
        evaluation,
        folder,
        steps,
        vocab_size,
        feature_plan(config, student),
        width,
    )


def _open_stores(
    config: Config, folder: RunFolder, mesh: Mesh | Unjoined
) -> tuple[Config, list[TrainingSource]]:
    """(the configuration with what the caches know, the stores to learn from)."""
    if config.teacher.mode == "online":
        return config, with_models(config, open_online(config, mesh), mesh)
    # One rank looks: a cache that is being made may grow between two looks.
    stores = open_sources(config, mesh.run_on_rank0(lambda: _blocks(config, folder)))
    config = _with_known(config, stores, mesh)
    return config, with_caches(config, stores)


def _log_curriculum(config: Config, mesh: Mesh | Unjoined) -> None:
    if config.loss.curriculum and mesh.rank == 0:
        log.info(
            "loss.curriculum=%s: the teacher's targets alone, from %g of the run on its hidden "
            "states and attention%s, from %g on the true tokens as well",
            config.loss.curriculum,
            FEATURES_FROM,
            "" if config.loss.aligned else " (which have no weight here)",
            ALL_TERMS_FROM,
        )


def _with_known(config: Config, stores: list[TrainingSource], mesh: Mesh | Unjoined) -> Config:
    """Adds the settings recorded in the caches; refuses contradictions. Collective."""

    def check() -> None:
        check_known(config, [s.store for s in stores])
        for store in stores:
            line = other_targets(config, store.store)
            if line:
                log.info("%s", line)

    mesh.run_on_rank0(check)
    return with_known(config, stores[0].store)


def _blocks(config: Config, folder: RunFolder) -> list[tuple[int, ...] | None] | None:
    """Returns the blocks to train on of each store: those of the begun run, else all present."""
    if not config.cache.allow_incomplete:
        return None
    begun = folder.blocks()
    if begun is None or len(begun) != len(config.cache.sources):  # another run, to be refused
        return blocks_there(config)
    return begun


def build(run: Run, mesh: Mesh) -> Trainer:
    """Loads the student into its engine, then the online teacher; runs the checks that need them.

    Collective.
    """
    config = run.config
    assert config.student is not None
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.train.seed)
    student = load_student(
        config.student,
        mesh,
        deepspeed_config=deepspeed_config(config, mesh.world),
        seed=config.train.seed,
        vocab_size=run.vocab_size,
        features=run.features,
        projected_width=run.projected_width,
        pack=config.data.pack,
    )
    if config.train.activation_checkpointing:
        student.checkpoint_activations()
    trainer = Trainer(student, config, mesh, seq_len=run.stores[0].seq_len)
    student.check_head(name="student.model", device=mesh.device)
    if mesh.rank == 0:
        log_apart(student.model, config.data.pack, key="student.model")
    if config.data.pack == "isolate":
        check_isolation(
            backbone(student.model),
            name="student.model",
            seq_len=run.stores[0].seq_len,
            vocab_size=run.vocab_size,
            device=mesh.device,
        )
    if config.teacher.mode == "online":
        trainer.teacher = load_online(config, mesh, run.stores[0], features=run.features)
        if run.projected_width is not None:
            assert isinstance(trainer.teacher, OnlineTeacher)
            assert trainer.teacher.tokenizers is not None
            begin_projection(student, trainer.teacher.teacher, trainer.teacher.tokenizers, mesh)
    return trainer


def finish(run: Run, trainer: Trainer, mesh: Mesh, metrics: dict[str, float] | None) -> None:
    """Exports the model and the best one, which finishes the run. Collective."""
    mesh.run_on_rank0(run.folder.require_lock)
    if run.config.train.keep_best:
        _export_best(run, trainer, mesh)
    _export(
        run,
        trainer,
        mesh,
        run.folder.model,
        steps=run.steps,
        metrics=metrics or _last_evaluation(run.folder.path / "eval.jsonl"),
    )
    if mesh.rank == 0:
        log.info(
            "%s: %d steps done, the model is in %s", run.folder.path, run.steps, run.folder.model
        )


def _export_best(run: Run, trainer: Trainer, mesh: Mesh) -> None:
    """Exports the model of the lowest held-out loss, then reloads the last checkpoint."""
    best = mesh.run_on_rank0(lambda: checkpoint.best(run.folder.checkpoints))
    if best is None:
        return
    last = mesh.run_on_rank0(lambda: checkpoint.latest(run.folder.checkpoints))
    if best.path != last.path:
        checkpoint.load(trainer, best)
    _export(run, trainer, mesh, run.folder.best, steps=best.position.step, metrics=best.metrics)
    if best.path != last.path:
        checkpoint.load(trainer, last)
    if mesh.rank == 0:
        log.info(
            "%s: the lowest held-out loss, %.4f, is that of step %d",
            run.folder.best,
            best.metrics["loss"],
            best.position.step,
        )


def _export(
    run: Run,
    trainer: Trainer,
    mesh: Mesh,
    folder: Path,
    *,
    steps: int,
    metrics: dict[str, float] | None,
) -> None:
    learned, config = describe_teachers(run.config, run.stores), run.config
    recipe = run.stores[0].recipe
    made_at = recipe.get("temperature", config.loss.at(0).temperature)
    if "method" in recipe and not find_method(recipe["method"]).cached:
        made_at = None
    assert config.student is not None
    tokenizer = student_tokenizer(config) if mesh.rank == 0 else None
    with trainer.evaluation_weights():
        export(
            trainer.student,
            mesh,
            folder,
            tokenizer=tokenizer,
            own=functools.partial(own_files, config.student, tokenizer=tokenizer),
            card=lambda: model_card(
                config, learned=learned, steps=steps, metrics=metrics, made_at=made_at
            ),
        )


def _last_evaluation(path: Path) -> dict[str, Any] | None:
    # A run resumed after its last step has not evaluated anything itself.
    records = read_records(path)
    return {k: v for k, v in records[-1].items() if k != "step"} if records else None
