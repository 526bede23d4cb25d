"""Checks of what asking a teacher about a corpus takes: ranks, text, models, tokenizers."""

from __future__ import annotations

from typing import Any

from megadistill.config import Config, StudentConfig
from megadistill.models.model_files import ModelFiles
from megadistill.parallel import check_layout
from megadistill.preflight import folder_checks, model_checks, vocabulary_checks
from megadistill.preflight.mistakes import Mistakes
from megadistill.targets import find_method
from megadistill.teacher.engine import check_dtype


def check_asking(found: Mistakes, config: Config, world: int, *, writing: bool) -> Any:
    """Checks what asking the teacher about the corpus takes; returns the tokenizer, or None."""
    found.of(check_layout, tp=config.teacher.tp, world=world)
    found.of(folder_checks.check_corpus, config.data)
    if writing:
        found.of(folder_checks.check_store_folder, config.data.dir, "data.dir", "tokens")
    teacher = _check_teacher(found, config, "teacher")
    own_tokenizer = config.data.tokenizer is not None
    there = own_tokenizer or teacher is not None  # else its absence is reported already
    tokenizer = found.of(vocabulary_checks.find_tokenizer, config) if there else None
    if teacher is not None and tokenizer is not None:
        if find_method(config.targets.method).own_tokenizer:
            found.of(vocabulary_checks.check_projected, config)
        else:
            found.of(vocabulary_checks.check_tokenizer_fits, config, tokenizer, teacher)
    _, *others = config.of_each_teacher.items()
    for key, each in others:
        another = _check_teacher(found, each, key)
        if another is not None:
            found.of(
                vocabulary_checks.check_other_teacher, config, each.teacher, tokenizer, another
            )
    return tokenizer


def _check_teacher(found: Mistakes, config: Config, key: str) -> ModelFiles | None:
    """The files of the one teacher of `config`, which stands at `key`, where they are sound."""
    teacher = found.of(model_checks.check_model, config.teacher, f"{key}.model", with_weights=True)
    if teacher is not None:
        found.of(model_checks.check_seq_len, config.data.seq_len, teacher)
        found.of(model_checks.check_heads, config.teacher.tp, teacher)
        found.of(check_dtype, config.teacher, key=f"{key}.model")
        found.teachers.append((config, teacher))
    return teacher


def check_completeness(found: Mistakes, student: tuple[StudentConfig, ModelFiles] | None) -> None:
    """Each model's weights are those that its config.json asks for.

    Comes last: a model of another kind than it should be has a shorter message.
    """
    for config, files in found.teachers:
        found.of(model_checks.check_complete, config.teacher, files)
    if student is not None:
        found.of(model_checks.check_complete, *student)
    found.raise_all()
