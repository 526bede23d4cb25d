"""Configuration keys of the fields of run.json, for error messages.

A run records the recipes of its caches. With the teacher online they follow from the configuration;
of a cache that is read they are the cache's own, and the key that changed is the one that names it.
"""

from __future__ import annotations

import re
from typing import Any

from megadistill.blocks.recipe import Keys
from megadistill.config import Config
from megadistill.data.recipe_keys import keys_of

_OF_A_CACHE = re.compile(r"cache\.(\d+)\.(?:ensemble\.(\d+)\.)?(.+)")


def run_keys(config: Config) -> Keys:
    """Returns the keys of a run's fields under this configuration."""
    return Keys(
        of=lambda field: _key(field, config),
        way_out="restore the setting to resume, or choose another train.out_dir",
    )


def without_followers(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """`ours` less what follows from another key in which the two differ.

    `order.groups` is by default the largest divisor of `train.global_batch`.
    """
    batches = [each.get("train", {}).get("global_batch") for each in (ours, theirs)]
    if batches[0] == batches[1]:
        return ours
    order = {name: value for name, value in ours.get("order", {}).items() if name != "groups"}
    return ours | {"order": order}


def _key(field: str, config: Config) -> str:
    found = _OF_A_CACHE.fullmatch(field)
    if found is None:
        return field
    store, member, rest = found.groups()
    online = config.teacher.mode == "online"
    ensemble = "teacher.ensemble" if online else "cache.ensemble"
    if rest.partition(".")[0] == "ensemble":  # a member that only one of the two has
        return rest.replace("ensemble", ensemble, 1)
    key = keys_of(config, kind="cache").of(rest) if rest.startswith("recipe.") else rest
    if member is not None:
        if online or rest == "weight":
            return f"{ensemble}.{member}.{key.removeprefix('teacher.')}"
        return f"{key} of {ensemble}.{member}.dir"
    if key != rest:
        return key if online else f"{key} of cache.dir"
    if online:
        return "data.max_samples" if rest == "sequences" else rest
    several = not isinstance(config.cache.dir, str)
    place = f"cache.dir.{store}" if several else "cache.dir"
    if rest == "blocks":
        return f"blocks of {place} (cache.allow_incomplete)"
    return f"{place}.weight" if rest == "weight" else f"{rest} of {place}"
