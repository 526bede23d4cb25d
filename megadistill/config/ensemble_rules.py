"""Rules of several teachers: what `cache.ensemble` does not go together with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megadistill.config.problem import Problem

if TYPE_CHECKING:
    from megadistill.config.schema import Config


def _caches(config: Config) -> Iterator[Problem]:
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
            "cache.ensemble out",
        )
    if config.student is not None and not config.loss.learns_from_teacher:
        yield Problem(
            ("cache.ensemble", "loss.kd_weight"),
            "nobody learns from teachers with loss.kd_weight=0: set it, or cache.ensemble=[]",
        )


ENSEMBLES = (_caches,)
