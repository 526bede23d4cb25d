"""Whether the caches that a training run names fit its configuration, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megadistill.blocks import BlockReader, open_store
from megadistill.cache.recorded_settings import check_known, check_targets, local_store, with_known
from megadistill.config import Config
from megadistill.errors import ConfigError, MegadistillError
from megadistill.storage.disk import is_url


def check_caches(config: Config) -> Config:
    """The configuration of a training run, with what the cache on this machine knows.

    ConfigError where set keys contradict it, or its targets do not serve the loss. A cache at a URL
    is asked when training starts, and the teacher's weights are compared then as well.
    """
    if config.student is None or config.teacher.mode == "online":
        return config
    lines: list[str] = []
    paths = [source.dir for source in config.cache.sources]
    stores = [store for path in paths if (store := _opened(path)) is not None]
    lines += _said(check_known, config, stores, contents=False)
    first = local_store(config)
    known = config if first is None else with_known(config, first)
    for key, path in _caches(config) if config.loss.learns_from_teacher else ():
        store = _opened(path)
        if store is not None and store.kind == "cache":
            lines += _said(check_targets, known, store.recipe, name=store.name, key=key)
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return known


def _caches(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of every cache that is learned from."""
    for source in config.cache.sources:
        yield "cache.dir", source.dir
    for number, other in enumerate(config.cache.ensemble):
        yield f"cache.ensemble.{number}.dir", other.dir


def _opened(path: str) -> BlockReader | None:
    """The store in a folder of this machine; None where there is none, or a damaged one."""
    if is_url(path):
        return None
    try:
        return open_store(path)
    except MegadistillError:  # another check reports it
        return None


def _said(check: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    try:
        check(*args, **options)
    except ConfigError as error:
        return str(error).splitlines()
    return []
