"""Checks of a cache before a teacher is loaded. They write nothing: for a dry run.

They raise what `build_cache` raises before it loads the teacher, in the same order. A token store
that is not complete is not made: what is known of it then is its recipe.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from megadistill.blocks import BlockReader, open_store
from megadistill.blocks.existing import find_existing, require_unlocked
from megadistill.blocks.layout import kind_of
from megadistill.cache.cache_recipe import cache_recipe, chosen_positions, weights_are_here
from megadistill.cache.cache_store import cache_settings, caches_to_build, is_done, require_shards
from megadistill.config import Config
from megadistill.config.held_out import in_eval_keys
from megadistill.data.learned import require_learned
from megadistill.data.token_checks import check_tokens
from megadistill.data.token_plan import TokenPlan


def check_build(config: Config) -> None:
    """Refuses what `build_cache` refuses before it loads a teacher, without writing.

    Raises DataError, ConfigError, RecipeError, StoreError and LockedError as it does.
    """
    for each in reversed(caches_to_build(config)):
        with in_eval_keys(each) if each is not config else contextlib.nullcontext():
            tokens = check_tokens(each)
            if isinstance(tokens, BlockReader):
                require_learned(tokens, key="data.dir")
            store = _find_cache(each, tokens)
        if store is None or (isinstance(tokens, BlockReader) and is_done(each, store, tokens)):
            continue
        require_unlocked(store)
        require_shards(store)


def _find_cache(config: Config, tokens: BlockReader | TokenPlan) -> BlockReader | None:
    """The cache that this run resumes; None where it begins one. RecipeError for another cache."""
    chosen_positions(config, tokens)
    folder = config.cache.folder
    if kind_of(Path(folder)) != "cache":
        return None
    store = open_store(folder)
    if not store.present():  # one without blocks begins anew
        require_unlocked(store)
        return None
    identity = None if weights_are_here(config.teacher) else store.recipe["teacher"]
    recipe = cache_recipe(config, tokens, identity=identity)
    settings = cache_settings(config, tokens, recipe, ids_bin=store.ids_bin())
    return find_existing(folder, **settings)
