"""Checks for mistakes that show before a model is loaded, or a byte is written.

A run that fails for a reason that was plain at its start, after an hour of loading, costs the hour
on every GPU. So the configuration is held against the files of the models, the tokenizers, the
corpus, the folders, the disk and the number of ranks first, and all mistakes are reported at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megadistill.cache.recorded_settings import with_local_known
from megadistill.config import Config, StudentConfig
from megadistill.config.held_out import evaluation_cache, held_out, in_eval_keys
from megadistill.config.rules import divergence_problems, not_cached
from megadistill.config.schema import with_temperature
from megadistill.errors import ConfigError, MegadistillError
from megadistill.models.model_files import ModelFiles
from megadistill.preflight import folder_checks, model_checks, vocabulary_checks
from megadistill.preflight.cache_checks import check_caches
from megadistill.preflight.memory_checks import check_memory
from megadistill.preflight.plan import Plan, make_plan
from megadistill.targets import find_method
from megadistill.train.reporting.trackers import check_trackers

__all__ = ["check_generate", "check_train"]


def check_generate(config: Config, *, world: int, writing: bool = True) -> Plan:
    """Refuse what would fail `launch/generate.py` on `world` ranks: ConfigError, a line each.

    Returns the plan that the disk was held against. `writing`: whether the configured folders will
    be written to.

    The student is looked at too where it can be found: a vocabulary that does not fit should be
    known before the teacher has run for days.
    """
    found = _Mistakes()
    found.of(_keeps_a_cache, config)
    found.of(_serves_the_loss, config)
    tokenizer = _check_asking(found, config, world, writing=writing)
    if writing:
        found.of(folder_checks.check_cache_folder, config)
    found.of(_check_held_out, config, writing=writing)
    student = vocabulary_checks.student_if_there(config)
    if student is not None:
        found.of(vocabulary_checks.check_same_vocabulary, config, tokenizer, student)
        found.of(model_checks.check_seq_len, config, student)
    found.of(check_memory, config, teachers=found.teachers, student=None, world=world)
    plan = make_plan(config, world=world, training=False)
    if writing:
        found.of(folder_checks.check_room, config, plan, training=False)
    found.raise_all()
    _check_complete(found, None)
    return plan


def _keeps_a_cache(config: Config) -> None:
    if config.teacher.mode == "online" and held_out(config) is None:
        raise ConfigError(
            "teacher.mode: online keeps no cache, the teacher answers while the student trains: "
            "run launch/train.py, or set teacher.mode=cached; with eval.files the held-out cache "
            "is made here"
        )


def _check_held_out(config: Config, *, writing: bool) -> None:
    """The text of `eval.files` is there and another than that of `data`, its folders are free."""
    made = held_out(config)
    if made is None:
        return
    with in_eval_keys(made):
        folder_checks.check_corpus(made)
        if config.data.files is not None and made.data.files is not None:
            folder_checks.check_apart(config.data.files, made.data.files)
        if writing:
            folder_checks.check_store_folder(made.data.dir, "data.dir", "tokens")
            folder_checks.check_store_folder(made.cache.folder, "cache.dir", "cache")


def _serves_the_loss(config: Config) -> None:
    """The targets that are asked for can be cached, and serve the loss where a student is set."""
    if config.teacher.mode == "cached" and not find_method(config.targets.method).cached:
        raise ConfigError(str(not_cached(config)))
    if config.student is not None and config.loss.learns_from_teacher:
        known = config
        if "temperature" not in config.loss.model_fields_set:
            loss = with_temperature(config.loss, config.targets.temperature)
            known = config.model_copy(update={"loss": loss})
        for problem in divergence_problems(known):
            raise ConfigError(str(problem))


def _check_asking(found: _Mistakes, config: Config, world: int, *, writing: bool) -> Any:
    """Checks what asking the teacher about the corpus takes; returns the tokenizer, or None."""
    found.of(model_checks.check_ranks, config, world)
    found.of(folder_checks.check_corpus, config)
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


def _check_teacher(found: _Mistakes, config: Config, key: str) -> ModelFiles | None:
    """The files of the one teacher of `config`, which stands at `key`, where they are sound."""
    teacher = found.of(model_checks.check_model, config.teacher, f"{key}.model", with_weights=True)
    if teacher is not None:
        found.of(model_checks.check_seq_len, config, teacher)
        found.of(model_checks.check_heads, config, teacher)
        found.teachers.append((config, teacher))
    return teacher


def check_train(config: Config, *, world: int) -> None:
    """Refuse what would fail `launch/train.py` on `world` ranks: ConfigError, a line each.

    The teacher is not needed to train from a cache; it is compared where it can be found.
    """
    if config.student is None:
        raise ConfigError(
            "student: there is nothing to train: add the section, with student.model a folder or "
            "a hub id"
        )
    from megadistill.train.hardware_checks import check_machine

    found = _Mistakes()
    found.of(check_machine, config)
    known = found.of(check_caches, config)
    config = with_local_known(config) if known is None else known
    assert config.student is not None
    online = config.teacher.mode == "online"
    tokenizer = _check_asking(found, config, world, writing=True) if online else None
    for source in [] if online else config.cache.sources:
        found.of(
            folder_checks.check_cache_is_there,
            source.dir,
            key="cache.dir",
            way_out="make it with launch/generate.py and the same configuration",
            text_is_enough=not config.loss.learns_from_teacher,
        )
    for number, other in enumerate(config.cache.ensemble):
        found.of(
            folder_checks.check_cache_is_there,
            other.dir,
            key=f"cache.ensemble.{number}.dir",
            way_out="make it with launch/generate.py, its own teacher.model and cache.dir, and the "
            "same data",
        )
    asked = evaluation_cache(config)
    if asked is not None:
        key, path = asked
        made = "targets.method=topk and held-out text" if key == "eval.cache" else "the same keys"
        found.of(
            folder_checks.check_cache_is_there,
            path,
            key=key,
            way_out=f"make it with launch/generate.py and {made}; or train without, by {key}=null",
        )
    found.of(folder_checks.check_run_folder, config)
    found.of(check_trackers, config)
    with_weights = config.student.init == "pretrained"
    student = found.of(
        model_checks.check_model, config.student, "student.model", with_weights=with_weights
    )
    if student is not None:
        found.of(model_checks.check_seq_len, config, student)
        if not online and _teacher_is_there(config):
            tokenizer = vocabulary_checks.tokenizer_if_there(config)
        found.of(vocabulary_checks.check_same_vocabulary, config, tokenizer, student)
        found.of(check_memory, config, teachers=found.teachers, student=student, world=world)
        if found.teachers:
            found.of(model_checks.check_features, config)
    found.of(folder_checks.check_room, config, make_plan(config, world=world), training=True)
    found.raise_all()
    _check_complete(found, (config.student, student) if with_weights else None)


def _check_complete(found: _Mistakes, student: tuple[StudentConfig, ModelFiles] | None) -> None:
    """Each model's weights are those that its config.json asks for.

    Comes last: a model of another kind than it should be has a shorter message.
    """
    for config, files in found.teachers:
        found.of(model_checks.check_complete, config.teacher, files)
    if student is not None:
        found.of(model_checks.check_complete, *student)
    found.raise_all()


def _teacher_is_there(config: Config) -> bool:
    """Whether its files are on this machine; a cache's recipe says what it was made with."""
    try:
        model_checks.find_section_model(config.teacher, "teacher.model", fetch=False)
    except ConfigError:
        return False
    return True


class _Mistakes:
    """The mistakes so far, one line each; and the teachers found, each with its configuration."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.teachers: list[tuple[Config, ModelFiles]] = []

    def of(self, check: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Returns the result of `check`; None, and its mistake noted, for a MegadistillError."""
        try:
            return check(*args, **options)
        except MegadistillError as error:
            self.lines += str(error).splitlines()
            return None

    def raise_all(self) -> None:
        if self.lines:
            raise ConfigError("\n".join(dict.fromkeys(self.lines)))
