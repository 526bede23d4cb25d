"""Checks of `launch/train.py` before a model is loaded."""

from __future__ import annotations

from megadistill.cache.recorded_settings import with_local_known
from megadistill.config import Config
from megadistill.config.held_out import evaluation_cache
from megadistill.errors import ConfigError
from megadistill.preflight import folder_checks, model_checks, vocabulary_checks
from megadistill.preflight.cache_checks import check_caches
from megadistill.preflight.memory_checks import check_memory
from megadistill.preflight.mistakes import Mistakes
from megadistill.preflight.plan import make_plan
from megadistill.preflight.teacher_checks import check_asking, check_completeness
from megadistill.train.hardware_checks import check_machine
from megadistill.train.reporting.trackers import check_trackers


def check_train(config: Config, *, world: int) -> Config:
    """Refuse what would fail `launch/train.py` on `world` ranks: ConfigError, a line each.

    Returns the configuration with what the caches on this machine know. The teacher is not needed
    to train from a cache; it is compared where it can be found.
    """
    if config.student is None:
        raise ConfigError(
            "student: there is nothing to train: add the section, with student.model a folder or "
            "a hub id"
        )
    found = Mistakes()
    found.of(check_machine, config.deepspeed)
    known = found.of(check_caches, config)
    config = with_local_known(config) if known is None else known
    assert config.student is not None
    online = config.teacher.mode == "online"
    tokenizer = check_asking(found, config, world, writing=True) if online else None
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
    found.of(folder_checks.check_run_folder, config.train.out_dir)
    found.of(check_trackers, config.train.trackers)
    with_weights = config.student.init == "pretrained"
    student = found.of(
        model_checks.check_model, config.student, "student.model", with_weights=with_weights
    )
    if student is not None:
        found.of(model_checks.check_seq_len, config.data.seq_len, student)
        if not online and _teacher_is_there(config):
            tokenizer = vocabulary_checks.tokenizer_if_there(config)
        found.of(vocabulary_checks.check_same_vocabulary, config, tokenizer, student)
        found.of(check_memory, config, teachers=found.teachers, student=student, world=world)
        if found.teachers:
            found.of(model_checks.check_features, config)
    found.of(folder_checks.check_room, config, make_plan(config, world=world), training=True)
    found.raise_all()
    check_completeness(found, (config.student, student) if with_weights else None)
    return config


def _teacher_is_there(config: Config) -> bool:
    """Whether its files are on this machine; a cache's recipe says what it was made with."""
    try:
        model_checks.find_section_model(config.teacher, "teacher.model", fetch=False)
    except ConfigError:
        return False
    return True
