"""Retruncating: targets to fewer entries, without the teacher, and unbiased where they were.

A cache made once with small tau or large k serves students that need less, and smaller disks.
varopt goes to a larger tau: the old weights, which sum to 1, are themselves a distribution, of
which threshold sampling is taken again, with random numbers of its own; E[new weight] = old weight,
so what was unbiased stays so. Its variance is above that of sampling the teacher at the new tau
once, by the variance that the old targets have. topk and topp keep the beginning of the list and
add to the tail what they drop.

Shape letters: N positions, E entries of all positions, K entries of the longest row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megadistill.blocks import BlockReader, BlockWriter
from megadistill.blocks.recipe import Keys
from megadistill.cache.reader import Cache, open_cache
from megadistill.cache.writer import CacheWriter
from megadistill.data.recipe_keys import keys_of
from megadistill.errors import ConfigError, CorruptBlockError, StoreError
from megadistill.models.packed_sequences import sample_labels
from megadistill.targets import SparseTargets, concatenate, sparse_method
from megadistill.targets.registered import own_sparse_names


def retruncate_targets(
    targets: SparseTargets,
    *,
    keys_N: np.ndarray,
    tau: float | None = None,
    k: int | None = None,
    p: float | None = None,
    options: Mapping[str, Any] | None = None,
    labels_N: np.ndarray | None = None,
    seed: int = 0,
    times: int = 0,
) -> SparseTargets:
    """The targets at a larger tau (varopt), or at a smaller k or p (topk, topp), as numpy arrays.

    keys_N    int64 [N, 2]: (sequence number, position), which with seed and times fix the draw
    options   parameters of a method of another distribution, by name
    labels_N  int64 [N] the true next tokens, or None. Of topk and topp a dropped entry that is the
              truth is kept as added; without labels it goes to the tail like the others
    times     how often these targets were retruncated before: reusing a draw would bias them

    Whether the parameter is larger or smaller than that of the targets is not known here, see
    `retruncated_recipe`. Raises ConfigError for a parameter that the method does not have.
    """
    given = _given(tau, k, p, options)
    _require_parameters_of(targets.method, given)
    return sparse_method(targets.method).retruncate(
        targets.numpy(), given, keys_N=keys_N, labels_N=labels_N, seed=seed, times=times
    )


def _given(
    tau: float | None, k: int | None, p: float | None, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    named = {name: v for name, v in (("tau", tau), ("k", k), ("p", p)) if v is not None}
    return {**named, **(options or {})}


# Caches -------------------------------------------------------------------------------------------


def retruncate_cache(
    path: str | Path,
    out: str | Path,
    *,
    tau: float | None = None,
    k: int | None = None,
    p: float | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> BlockReader:
    """The complete cache at `path`, retruncated block by block into one at `out`.

    Resumes an interrupted run. progress is called with each block's number
    when it is durable. Raises ConfigError for parameters that do not make the targets smaller,
    StoreError for a source that is not complete, RecipeError where `out` holds another cache.
    """
    source = open_cache(path)
    given = _given(tau, k, p, options)
    recipe = retruncated_recipe(source, given, seed=seed)
    if not source.complete():
        raise StoreError(
            f"{path}: is not complete, and its missing blocks would be missing in {out}: finish it "
            "with launch/generate.py, or merge its parts, first"
        )
    store = BlockWriter.create_like(
        out,
        source.store,
        header=source.header | {"recipe": recipe},
        keys=Keys(_option, "give the same options, or another --out"),
    )
    if store.num_sequences == source.num_sequences and store.complete():
        return store
    with store.lock():
        store.clean()
        store.plan(len(source))
        missing = itertools.groupby(
            store.missing(), lambda b: source.store.marker(b).get("made_with")
        )
        for made_with, blocks in missing:
            with CacheWriter(store, made_with=made_with, on_commit=progress) as writer:
                for block in blocks:
                    writer.submit(block, *_block(source, block, recipe, given))
        store.finish()
    return store


def _option(field: str) -> str:
    """Returns a recipe field's option on the command line; a configuration's key elsewhere."""
    name = field.rpartition(".")[2]
    if field.startswith("recipe.options."):
        return f"--option {name}"
    ours = field in ("recipe.tau", "recipe.k", "recipe.p", "recipe.retruncated_from.seed")
    return f"--{name}" if ours else keys_of(None, kind="cache").of(field)


def retruncated_recipe(cache: Cache, given: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """The recipe of `cache` retruncated: new parameters, and what it was made from.

    ConfigError for parameters that the method does not have, or that keep more than there is.
    """
    recipe = cache.recipe
    header = str(cache.store.layout.header("cache"))
    chosen = cache.method
    _require_parameters_of(chosen.name, given, where=f"{cache.path}: ")
    recorded = chosen.recorded(recipe)
    for name, value in given.items():
        old, most = recorded.get(name), chosen.grows_to.get(name)
        if not isinstance(old, int | float):
            raise CorruptBlockError(header, f"a number as recipe.{name}", old)
        fits = old < value <= most if most is not None else 0 < value < old
        if not fits:
            bounds = f"above {old}, at most {most:g}" if most is not None else f"from 0 to {old}"
            raise ConfigError(
                f"{name}: is {old} in {cache.path}, found {value}, expected {bounds}: what was "
                "left out is not there; generate again for more"
            )
    if chosen.outside:
        try:
            chosen.chosen({}, recorded | given)
        except ValueError as error:
            raise ConfigError(f"{cache.path}: {error}") from error
    made_from = chosen.record({name: recorded[name] for name in given})
    if "retruncated_from" in recipe:
        made_from["retruncated_from"] = recipe["retruncated_from"]
    made_from["content_hash"] = cache.store.content_hash()
    if chosen.sampled:
        made_from["seed"] = seed
    return {**recipe, **chosen.record(recorded | given), "retruncated_from": made_from}


def _require_parameters_of(method: str, given: dict[str, Any], *, where: str = "") -> None:
    known = sparse_method(method).retruncated_by
    wrong = [name for name in given if name not in known]
    if not known:
        raise ConfigError(
            f"{where}{method} targets cannot be retruncated, expected one of "
            f"{', '.join(n for n in own_sparse_names() if sparse_method(n).retruncated_by)}: "
            "generate again with fewer draws"
        )
    if wrong or not given:
        found = f"{', '.join(given)} given" if given else "none given"
        raise ConfigError(
            f"{where}{method} targets are retruncated by {' or '.join(known)}, found {found}: set "
            f"{known[0]}"
        )


def _block(
    source: Cache, block: int, recipe: dict[str, Any], given: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[SparseTargets]]:
    made_from, times = recipe["retruncated_from"], 0
    seed = made_from.get("seed", 0)
    while "retruncated_from" in made_from:
        made_from, times = made_from["retruncated_from"], times + 1
    samples = source.block(block)
    first, length = block * source.store.block_size, len(samples[0]["tokens"])
    numbers, positions = np.divmod(np.arange(len(samples) * length), length)
    masked = recipe.get("positions") == "loss_mask"
    targets = retruncate_targets(
        concatenate([s.pop("targets") for s in samples]),
        keys_N=np.stack([first + numbers, positions], 1),
        labels_N=np.concatenate([sample_labels(s, masked=masked) for s in samples]),
        seed=seed,
        times=times,
        options=given,
    )
    return samples, [targets.rows(i * length, (i + 1) * length) for i in range(len(samples))]
