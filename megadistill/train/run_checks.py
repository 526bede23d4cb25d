"""Checks of a training run that need its stores and no model, made together by all ranks.

`run.prepare` calls them when a run starts, and `check_run` for a dry run.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from megadistill.cache.recorded_settings import pack_of
from megadistill.config import Config
from megadistill.config.held_out import evaluation_cache
from megadistill.data.token_plan import TokenPlan
from megadistill.errors import ConfigError
from megadistill.parallel import Mesh, Unjoined
from megadistill.student.model import check_fits, student_settings
from megadistill.train.evaluate import Evaluation, open_evaluation
from megadistill.train.export import check_tokenizer
from megadistill.train.hardware_checks import check_machine
from megadistill.train.reporting.trackers import check_trackers
from megadistill.train.student_engine import deepspeed_config
from megadistill.train.training_source import TrainingSource, local_copies

log = logging.getLogger(__name__)


def check_settings(config: Config, mesh: Mesh | Unjoined) -> None:
    """ConfigError for settings that this machine, or this number of ranks, cannot serve."""
    if config.student is None:
        raise ConfigError("student: there is nothing to train: set student.model")
    trackers = config.train.trackers
    mesh.run_on_rank0(lambda: check_trackers(trackers, load=True))
    deepspeed_config(config, mesh.world)
    check_machine(config.deepspeed)
    section = "activation_checkpointing"
    if config.deepspeed.get(section) and mesh.rank == 0:
        log.warning(
            "deepspeed.%s is for models that call DeepSpeed's own function, and transformers' do "
            "not: it changes nothing here; train.%s=true is what does",
            section,
            section,
        )


def open_held_out(
    config: Config,
    mesh: Mesh | Unjoined,
    text: TrainingSource | TokenPlan,
    stores: list[TrainingSource],
) -> Evaluation | None:
    """The held-out cache, checked against the run's text; None where none is asked for.

    stores: all that are trained on, as far as they are there.
    """
    asked = evaluation_cache(config)
    evaluation = open_evaluation(
        asked, max_sequences=config.eval.max_sequences, local=local_copies(config.cache)
    )
    if evaluation is None:
        return None
    held = evaluation.sequences
    if held.tokenizer["content"] != text.tokenizer["content"]:
        raise ConfigError(
            f"{held.key}: {held.name} was made with another tokenizer than {text.name}: "
            "generate it again with this run's data.tokenizer"
        )
    mesh.run_on_rank0(lambda: _check_evaluation(config, evaluation, stores))
    return evaluation


def check_student(
    config: Config,
    mesh: Mesh | Unjoined,
    text: TrainingSource | TokenPlan,
    evaluation: Evaluation | None,
) -> tuple[Any, int]:
    """(the student's transformers configuration, ids of data, teachers and its tokenizer).

    text: what is trained on. ConfigError where the student has another tokenizer, fewer ids, or is
    made for less context.
    """
    assert config.student is not None
    own = mesh.run_on_rank0(lambda: check_tokenizer(config, text.tokenizer, store=text.name))
    held_out = [] if evaluation is None else [evaluation.sequences.vocab_size]
    # Tokens that were added to the student's are tokens, too.
    ids = max(own, text.vocab_size, *held_out)
    student = student_settings(config.student)
    check_fits(student, vocab_size=ids, seq_len=text.seq_len)
    if evaluation and evaluation.sequences.seq_len != text.seq_len:
        _check_length(evaluation, student, vocab_size=ids)
    if student.vocab_size > ids and mesh.rank == 0:
        log.info(
            "the student has %d rows, data and tokenizer %d ids: the rows above are padding, which "
            "takes no part in the softmax; the exported model has none",
            student.vocab_size,
            ids,
        )
    return student, ids


def _check_evaluation(config: Config, evaluation: Evaluation, stores: list[TrainingSource]) -> None:
    """ConfigError where the student would read the held-out text otherwise than its teacher did.

    DataError for a text without a label. Warns of blocks that are trained on as well. For rank 0.
    """
    evaluation.require_labels()
    held = evaluation.sequences
    pack = pack_of(held.recipe)
    if pack not in (None, config.data.pack):
        raise ConfigError(
            f"{held.key}: the teacher of {held.name} read its sequences with data.pack={pack}, and "
            f"the student reads them with {config.data.pack}: generate it again with "
            f"data.pack={config.data.pack}"
        )
    for store in stores:
        both = np.isin(held.store.tokens_xxh3(), store.store.tokens_xxh3())
        if both.any():
            log.warning(
                "%s: %d of %d blocks of %s are trained on as well, in %s: the figures are not "
                "those of held-out text",
                held.key,
                both.sum(),
                len(both),
                held.name,
                store.name,
            )


def _check_length(evaluation: Evaluation, student: Any, *, vocab_size: int) -> None:
    """ConfigError, naming the held-out cache, where its sequences are too long for the student."""
    held = evaluation.sequences
    try:
        check_fits(student, vocab_size=vocab_size, seq_len=held.seq_len)
    except ConfigError as error:
        raise ConfigError(f"{held.key}: {held.name}: {error}") from None
