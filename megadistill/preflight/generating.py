"""Checks of `launch/generate.py` before a model is loaded."""

from __future__ import annotations

from megadistill.config import Config
from megadistill.config.held_out import held_out, in_eval_keys
from megadistill.config.rules import divergence_problems, not_cached
from megadistill.config.schema import with_temperature
from megadistill.errors import ConfigError
from megadistill.preflight import folder_checks, model_checks, vocabulary_checks
from megadistill.preflight.memory_checks import check_memory
from megadistill.preflight.mistakes import Mistakes
from megadistill.preflight.plan import Plan, make_plan
from megadistill.preflight.teacher_checks import check_asking, check_completeness
from megadistill.targets import find_method


def check_generate(config: Config, *, world: int, writing: bool = True) -> Plan:
    """Refuse what would fail `launch/generate.py` on `world` ranks: ConfigError, a line each.

    Returns the plan that the disk was held against. `writing`: whether the configured folders will
    be written to.

    The student is looked at too where it can be found: a vocabulary that does not fit should be
    known before the teacher has run for days.
    """
    found = Mistakes()
    found.of(_keeps_a_cache, config)
    found.of(_serves_the_loss, config)
    tokenizer = check_asking(found, config, world, writing=writing)
    if writing:
        found.of(folder_checks.check_store_folder, config.cache.folder, "cache.dir", "cache")
    found.of(_check_held_out, config, writing=writing)
    student = vocabulary_checks.student_if_there(config)
    if student is not None:
        found.of(vocabulary_checks.check_same_vocabulary, config, tokenizer, student)
        found.of(model_checks.check_seq_len, config.data.seq_len, student)
    found.of(check_memory, config, teachers=found.teachers, student=None, world=world)
    plan = make_plan(config, world=world, training=False)
    if writing:
        found.of(folder_checks.check_room, config, plan, training=False)
    found.raise_all()
    check_completeness(found, None)
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
        folder_checks.check_corpus(made.data)
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
