"""Rules of several teachers: what `cache.ensemble`, `teacher.ensemble` do not go together with."""

from __future__ import annotations

from collections.abc import Iterator

from megadistill.config.problem import Problem
from megadistill.config.sections import Sections
from megadistill.targets import find_method


def _caches(config: Sections) -> Iterator[Problem]:
    cache = config.cache
    if not cache.ensemble:
        return
    if not isinstance(cache.dir, str):
        yield Problem(
            ("cache.ensemble", "cache.dir"),
            f"caches of other teachers beside a list of {len(cache.dir)} caches, of texts that "
            "these have not seen: set cache.dir to one cache, or leave cache.ensemble out",
        )
    if cache.allow_incomplete:
        yield Problem(
            ("cache.allow_incomplete", "cache.ensemble"),
            "true with cache.ensemble, whose caches would grow each by itself: finish them all, "
            "or leave one of the two out",
        )
    if config.teacher.mode == "online":
        yield Problem(
            ("cache.ensemble", "teacher.mode"),
            "caches are not read with teacher.mode=online: set teacher.mode=cached, or leave "
            "cache.ensemble out, and name the models in teacher.ensemble",
        )
    if config.student is not None and not config.loss.learns_from_teacher:
        yield Problem(
            ("cache.ensemble", "loss.kd_weight"),
            "nobody learns from teachers with loss.kd_weight=0: set it, or cache.ensemble=[]",
        )


def _models(config: Sections) -> Iterator[Problem]:
    teacher = config.teacher
    if not teacher.ensemble:
        return
    if teacher.mode != "online":
        yield Problem(
            ("teacher.ensemble", "teacher.mode"),
            f"{len(teacher.ensemble)} more with teacher.mode={teacher.mode}, where a cache is one "
            "teacher's: set teacher.mode=online, or generate a cache of each, and name them in "
            "cache.ensemble",
        )
    if config.targets.positions == "entropy":
        yield Problem(
            ("teacher.ensemble", "targets.positions"),
            "with targets.positions=entropy each teacher would leave out other positions: set "
            "targets.positions=all, or leave teacher.ensemble out",
        )
    if find_method(config.targets.method).own_tokenizer:
        yield Problem(
            ("teacher.ensemble", "targets.method"),
            f"with targets.method={config.targets.method}, which has one projector: set it to "
            "another method, or teacher.ensemble=[]",
        )
    # Where nothing of a teacher is wanted another rule says so.
    loss = config.loss
    if config.student is not None and loss.aligned and not loss.learns_from_teacher:
        yield Problem(
            ("teacher.ensemble", "loss.kd_weight"),
            "with loss.kd_weight=0 only the layers of teacher.model are learned from: set it, or "
            "teacher.ensemble=[]",
        )
    for number, member in enumerate(teacher.ensemble):
        # Of the section's own engine a rule of its own speaks.
        if member.engine == "zero3" and teacher.engine != "zero3" and teacher.tp > 1:
            yield Problem(
                (f"teacher.ensemble.{number}.engine", "teacher.tp"),
                f"zero3 with teacher.tp={teacher.tp}, expected 1: ZeRO-3 spreads a teacher over "
                "all ranks by itself; set teacher.tp=1, or leave the engine out",
            )


ENSEMBLES = (_caches, _models)
