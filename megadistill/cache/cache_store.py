"""Stores of caches: which ones a run makes, how they are created, what is left to do of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megadistill.blocks import BlockReader, BlockWriter, open_store
from megadistill.blocks.layout import kind_of
from megadistill.cache.cache_recipe import cache_recipe
from megadistill.cache.ranking import rank_ids
from megadistill.config import Config
from megadistill.config.held_out import held_out
from megadistill.data.names import store_names
from megadistill.data.recipe_keys import keys_of
from megadistill.data.token_plan import TokenPlan
from megadistill.errors import DataError, StoreError


def caches_to_build(config: Config) -> list[Config]:
    """The configuration of each cache that a run of `config` makes: the main one, the held-out one.

    Of several parts the first makes the held-out cache. With the teacher online it is the only one.
    """
    main = [] if config.teacher.mode == "online" else [config]
    extra = held_out(config) if config.cache.part_index[0] == 0 else None
    return main + ([] if extra is None else [extra])


def is_done(config: Config, store: BlockReader, tokens: BlockReader) -> bool:
    """Whether nothing is left to do of this run's part. DataError for a cache without a target."""
    planned = store.num_sequences == len(tokens) and not outdated_blocks(store, tokens)
    done = planned and not blocks_to_do(config, store) and store.consistent()
    if done:
        require_positions(store)
    return done


def outdated_blocks(store: BlockReader, tokens: BlockReader) -> list[int]:
    """The blocks whose token ids are others in the token store, which has grown since.

    The last sequences of a token store are padded, or fewer than a block, until more documents
    come. From blocks.bin of both stores, where it is there; no shard is read.
    """
    now = dict(zip(tokens.committed(), tokens.tokens_xxh3().tolist(), strict=True))
    then = zip(store.committed(), store.tokens_xxh3().tolist(), strict=True)
    return [block for block, found in then if now.get(block) != found]


def require_shards(store: BlockReader) -> None:
    """StoreError, before a teacher is loaded, where shards of committed blocks are gone."""
    lost = store.lost_shards()
    if lost:
        raise StoreError(
            f"{store.name}: {lost[0]} is missing or of another size ({len(lost)} such shard(s)): "
            f"run `python tools/merge_and_inspect.py --repair {store.name}`, then this command "
            "again, which makes the blocks anew"
        )


def create_store(config: Config, tokens: BlockReader) -> BlockWriter:
    """The cache's store in `cache.dir`, for the sequences of `tokens`; reads the teacher once."""
    recipe = cache_recipe(config, tokens)
    ids_bin = _ids_bin(config, tokens, vocab_size=recipe["vocab_size"])
    settings = cache_settings(config, tokens, recipe, ids_bin=ids_bin)
    return BlockWriter.create(config.cache.folder, **settings)


def cache_settings(
    config: Config,
    tokens: BlockReader | TokenPlan,
    recipe: dict[str, Any],
    *,
    ids_bin: bytes | None,
) -> dict[str, Any]:
    """The arguments of BlockWriter.create for a cache over a token store."""
    called = store_names(config) | {k: v for k, v in tokens.names.items() if k != "teacher.model"}
    names = ("tokens", "documents", "loss_mask", "padding")
    columns = {name: tokens.columns[name] for name in names if name in tokens.columns}
    return {
        "kind": "cache",
        "header": {"recipe": recipe, "names": called},
        "columns": {**columns, "targets": "bytes"},
        "block_size": tokens.block_size,
        "ids_bin": ids_bin,
        "keys": keys_of(config, kind="cache"),
    }


def _ids_bin(config: Config, tokens: BlockReader, *, vocab_size: int) -> bytes | None:
    """The ranking of ids: that of the cache's blocks, whatever tokens have joined since."""
    if kind_of(Path(config.cache.folder)) == "cache":
        store = open_store(config.cache.folder)
        if store.present():
            return store.ids_bin()
    return rank_ids(tokens, vocab_size=vocab_size).to_bytes()


def blocks_to_do(config: Config, store: BlockReader) -> list[int]:
    """The missing blocks of this run's part."""
    index, parts = config.cache.part_index
    return [block for block in store.missing() if block % parts == index]


def require_positions(store: BlockReader) -> None:
    """DataError for a whole cache without a target: a threshold of entropy may leave none."""
    if store.missing():
        return  # the other parts'
    if not sum(store.marker(b)["statistics"]["positions"] for b in store.committed()):
        raise DataError(
            f"{store.name}: not one position has a target, so that there is nothing to learn: set "
            "targets.min_entropy lower, or targets.positions to all or loss_mask, and cache.dir to "
            "another folder"
        )
