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

import dataclasses
import itertools
import math
from collections.abc import Callable
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
from megadistill.targets import METHODS, PARAMETERS, SAMPLED, SparseTargets, concatenate

_MOST = {"tau": 1.0}  # the parameters that grow; the others shrink


def retruncate_targets(
    targets: SparseTargets,
    *,
    keys_N: np.ndarray,
    tau: float | None = None,
    k: int | None = None,
    p: float | None = None,
    labels_N: np.ndarray | None = None,
    seed: int = 0,
    times: int = 0,
) -> SparseTargets:
    """The targets at a larger tau (varopt), or at a smaller k or p (topk, topp), as numpy arrays.

    keys_N    int64 [N, 2]: (sequence number, position), which with seed and times fix the draw
    labels_N  int64 [N] the true next tokens, or None. Of topk and topp a dropped entry that is the
              truth is kept as added; without labels it goes to the tail like the others
    times     how often these targets were retruncated before: reusing a draw would bias them

    Whether the parameter is larger or smaller than that of the targets is not known here, see
    `retruncated_recipe`. Raises ConfigError for a parameter that the method does not have.
    """
    given = {name: v for name, v in (("tau", tau), ("k", k), ("p", p)) if v is not None}
    _require_parameters_of(targets.method, given)
    t = targets.numpy()
    if targets.method == "varopt":
        return _varopt(t, keys_N, tau=given["tau"], seed=seed, times=times)
    return _listed(t, k=k, p=p, labels_N=labels_N)


def _varopt(
    t: SparseTargets, keys_N: np.ndarray, *, tau: float, seed: int, times: int
) -> SparseTargets:
    import torch

    from megadistill.storage.counter_rng import TRUNCATE, TRUNCATE_ROUND, uniforms
    from megadistill.teacher.distributions import FIXED_POINT, Distributions, VocabularySlice
    from megadistill.teacher.select import spread
    from megadistill.teacher.select_sampled import varopt

    keep_N = t.counts > 0
    if not keep_N.any():
        return t
    ids_NK, weights_NK = t.padded()
    ids_NK, weights_NK = ids_NK[keep_N], weights_NK[keep_N]
    starts = [
        torch.from_numpy(uniforms(keys_N[keep_N], np.array([times]), seed=seed, purpose=purpose))
        for purpose in (TRUNCATE, TRUNCATE_ROUND)
    ]
    # The entries of a row are the ids of its vocabulary. Padding has weight 0 and is never drawn.
    fixed_NK = torch.from_numpy(np.rint(weights_NK.astype(np.float64) * FIXED_POINT)).long()
    entries = Distributions(
        torch.from_numpy(weights_NK), fixed_NK, VocabularySlice(0, weights_NK.shape[1])
    )
    chosen = varopt(
        entries,
        starts[0][:, 0],
        tau=tau,
        method="varopt",
        temperature=t.temperature,
        rounding=starts[1][:, 0] >> 12,
    )
    row_E = np.repeat(np.arange(len(ids_NK)), chosen.counts.numpy())
    ids_E = torch.from_numpy(ids_NK[row_E, chosen.ids.numpy()])
    kept = spread(dataclasses.replace(chosen, ids=ids_E), torch.from_numpy(keep_N)).numpy()
    return dataclasses.replace(kept, entropy=t.entropy, nll=t.nll)


def _listed(
    t: SparseTargets, *, k: int | None, p: float | None, labels_N: np.ndarray | None
) -> SparseTargets:
    counts = t.counts
    added_N = np.zeros(len(t), bool) if t.truth_added is None else t.truth_added.astype(bool)
    row_E = np.repeat(np.arange(len(t)), counts)
    added_E = np.zeros(len(t.ids), bool)
    added_E[t.offsets[1:][added_N] - 1] = True
    order = np.lexsort((t.ids, -t.weights, added_E, row_E))
    ids, weights, added_E = t.ids[order], t.weights[order], added_E[order]

    rank_E = np.arange(len(ids)) - t.offsets[row_E]
    keep_E = added_E | (rank_E < (math.inf if k is None else k))
    if p is not None:
        # Sums of integers, so that a position's cut does not depend on its neighbours.
        fixed_E = np.rint(weights.astype(np.float64) * 2.0**40).astype(np.int64)
        before_E = np.cumsum(fixed_E) - fixed_E
        keep_E &= added_E | (before_E - before_E[t.offsets[row_E]] < p * 2.0**40)
    if labels_N is not None:
        truth_E = (ids == labels_N[row_E]) & ~keep_E
        keep_E |= truth_E
        added_N = added_N | (np.bincount(row_E[truth_E], minlength=len(t)) > 0)
    dropped_N = np.bincount(row_E[~keep_E], weights[~keep_E], minlength=len(t))
    counts = np.bincount(row_E[keep_E], minlength=len(t))
    return dataclasses.replace(
        t,
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        ids=ids[keep_E],
        weights=weights[keep_E],
        tail=(t.tail + dropped_N).astype(np.float32),
        truth_added=added_N,
    )


# Caches -------------------------------------------------------------------------------------------


def retruncate_cache(
    path: str | Path,
    out: str | Path,
    *,
    tau: float | None = None,
    k: int | None = None,
    p: float | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> BlockReader:
    """The complete cache at `path`, retruncated block by block into one at `out`.

    Resumes an interrupted run. progress is called with each block's number
    when it is durable. Raises ConfigError for parameters that do not make the targets smaller,
    StoreError for a source that is not complete, RecipeError where `out` holds another cache.
    """
    source = open_cache(path)
    given = {name: v for name, v in (("tau", tau), ("k", k), ("p", p)) if v is not None}
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
    ours = field in ("recipe.tau", "recipe.k", "recipe.p", "recipe.retruncated_from.seed")
    return f"--{name}" if ours else keys_of(None, kind="cache").of(field)


def retruncated_recipe(cache: Cache, given: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """The recipe of `cache` retruncated: new parameters, and what it was made from.

    ConfigError for parameters that the method does not have, or that keep more than there is.
    """
    recipe, method = cache.recipe, cache.recipe.get("method")
    header = str(cache.store.layout.header("cache"))
    if method not in METHODS:
        raise CorruptBlockError(header, f"recipe.method, one of {', '.join(METHODS)}", method)
    _require_parameters_of(method, given, where=f"{cache.path}: ")
    for name, value in given.items():
        old, most = recipe.get(name), _MOST.get(name)
        if not isinstance(old, int | float):
            raise CorruptBlockError(header, f"a number as recipe.{name}", old)
        fits = old < value <= most if most is not None else 0 < value < old
        if not fits:
            bounds = f"above {old}, at most {most:g}" if most is not None else f"from 0 to {old}"
            raise ConfigError(
                f"{name}: is {old} in {cache.path}, found {value}, expected {bounds}: what was "
                "left out is not there; generate again for more"
            )
    older = {name: recipe[name] for name in (*given, "retruncated_from") if name in recipe}
    made_from = {**older, "content_hash": cache.store.content_hash()}
    if method in SAMPLED:
        made_from["seed"] = seed
    return {**recipe, **given, "retruncated_from": made_from}


def _require_parameters_of(method: str, given: dict[str, Any], *, where: str = "") -> None:
    known = () if method == "multinomial" else PARAMETERS[method]
    wrong = [name for name in given if name not in known]
    if not known:
        raise ConfigError(
            f"{where}{method} targets cannot be retruncated, expected one of varopt, topk, topp: "
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
        **given,
    )
    return samples, [targets.rows(i * length, (i + 1) * length) for i in range(len(samples))]
