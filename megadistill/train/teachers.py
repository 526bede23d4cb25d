"""Several teachers of one student: caches of the same text, or online teachers.

Sequence i of every cache must be the same text. The caches' blocks are compared when they are
opened, by the hashes of their token ids in blocks.bin: 8 bytes a block, and no shard is read.
Online teachers run one after the other, so that only one of those in host memory (`offload: cpu`)
is on the device at a time.

Shapes: none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from megadistill.blocks.recipe import first_difference
from megadistill.cache.recorded_settings import check_targets
from megadistill.config import Config, TeacherConfig
from megadistill.data.names import data_names, shown_name
from megadistill.data.recipe_keys import CORPUS_KEYS
from megadistill.errors import ConfigError, StoreError
from megadistill.parallel import Mesh, Unjoined
from megadistill.student.features import FeaturePlan
from megadistill.student.loss.divergences import divergence_of
from megadistill.targets.ensemble import Ensemble
from megadistill.targets.kinds import Member
from megadistill.train.online.online_teacher import OnlineTeacher, online_recipe
from megadistill.train.training_source import (
    MicroBatch,
    TrainingSource,
    local_copies,
    open_sequences,
)


def with_caches(config: Config, stores: list[TrainingSource]) -> list[TrainingSource]:
    """Returns the stores; the only one has the caches of cache.ensemble attached.

    Raises ConfigError or StoreError, naming the key, for a cache of other tokens or a missing one.
    """
    if not config.cache.ensemble:
        return stores
    (first,) = stores
    other_teachers = []
    for number, source in enumerate(config.cache.ensemble):
        key = f"cache.ensemble.{number}.dir"
        store = open_sequences(
            source.dir, key=key, with_targets=True, local=local_copies(config.cache)
        )
        _require_same_tokens(first, store, key=key)
        other_teachers.append(replace(store, key=key, teacher_weight=source.weight))
    return [replace(first, other_teachers=tuple(other_teachers))]


def with_models(
    config: Config, stores: list[TrainingSource], mesh: Mesh | Unjoined
) -> list[TrainingSource]:
    """Returns the stores; the only one has the recipes of teacher.ensemble attached. Collective.

    The recipes are part of the run's identity.
    """
    if not config.teacher.ensemble:
        return stores
    (first,) = stores
    _, *others = config.of_each_teacher.items()
    other_teachers = tuple(
        replace(
            first,
            online=online_recipe(each, mesh, first, key=key),
            teacher_weight=member.weight,
            key=f"{key}.model",
        )
        for (key, each), member in zip(others, config.teacher.ensemble, strict=True)
    )
    return [replace(first, other_teachers=other_teachers)]


class OnlineEnsemble:
    """Several teachers of a run, each an `OnlineTeacher`."""

    def __init__(
        self, config: Config, mesh: Mesh, store: TrainingSource, *, features: FeaturePlan | None
    ) -> None:
        """Loads one teacher after the other. Collective. features: of the first teacher."""
        self._teachers = [
            OnlineTeacher(
                each, mesh, store, features=features if key == "teacher" else None, key=key
            )
            for key, each in config.of_each_teacher.items()
        ]
        self._weights = [s.teacher_weight for s in (store, *store.other_teachers)]

    def answer(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """Returns the micro-batches with all targets. Collective. See `OnlineTeacher.answer`."""
        answers = [teacher.answer(micro_batches) for teacher in self._teachers]
        return [_of_all(batches, self._weights) for batches in zip(*answers, strict=True)]


def _of_all(batches: tuple[MicroBatch, ...], weights: list[float]) -> MicroBatch:
    """One micro-batch as all teachers answered it, with the targets of all."""
    targets = Ensemble.of([cast(Member, batch.targets) for batch in batches], weights)
    entropies = zip(batches, targets.shares, strict=True)
    kd_entropy = sum(share * batch.kd_entropy for batch, share in entropies)
    return replace(batches[0], targets=targets, kd_entropy=kd_entropy)


def load_online(
    config: Config, mesh: Mesh, store: TrainingSource, *, features: FeaturePlan | None = None
) -> OnlineTeacher | OnlineEnsemble:
    """Loads the online teacher or teachers. Collective."""
    kind = OnlineEnsemble if config.teacher.ensemble else OnlineTeacher
    return kind(config, mesh, store, features=features)


def check_divergences(config: Config, store: TrainingSource) -> None:
    """Raises ConfigError if a teacher's targets cannot serve the loss at some time of the run.

    Also if the divergence cannot be imported, or does not take `loss.options`.
    """
    divergence_of(config.loss.divergence, options=config.loss.options)
    for taught in (store, *store.other_teachers):
        check_targets(config, taught.recipe, name=taught.name, key=taught.key)


def describe_teachers(config: Config, stores: list[TrainingSource]) -> str:
    """Returns the names of teachers and text for the model card: no path, no host."""
    if config.teacher.mode == "online":
        text = " and ".join(data_names(config.data).values()) or shown_name(stores[0].name)
        return f"{_models_named(config.teacher)} ({config.targets.method}), on the text of {text}"
    if not stores[0].other_teachers:
        return ", ".join(dict.fromkeys(f"{_taught_by(s)}{_said(s)}{_text_of(s)}" for s in stores))
    members = (stores[0], *stores[0].other_teachers)
    named = " and ".join(
        f"{_taught_by(s)} (weight {s.teacher_weight:g}{_made(s)})" for s in members
    )
    return named + _text_of(stores[0])


def _models_named(teacher: TeacherConfig) -> str:
    name = shown_name(teacher.model or "")
    if not teacher.ensemble:
        return f"`{name}`"
    others = ((shown_name(each.model), each.weight) for each in teacher.ensemble)
    weights = [(name, 1.0), *others]
    return " and ".join(f"`{model}` (weight {weight:g})" for model, weight in weights)


def _taught_by(store: TrainingSource) -> str:
    """Returns the name of the teacher if the cache has it, else the name of the store."""
    name = store.store.names.get("teacher.model") if store.has_targets else None
    return f"`{name}`" if name else shown_name(store.name)


def _text_of(store: TrainingSource) -> str:
    names = store.store.names
    text = next((names[key] for key in CORPUS_KEYS if key in names), None)
    return f", on the text of {text}" if text else ""


def _made(store: TrainingSource) -> str:
    at = store.recipe["temperature"]
    return f", {store.recipe['method']}" + ("" if at == 1 else f" at temperature {at:g}")


def _said(store: TrainingSource) -> str:
    return f" ({_made(store)[2:]})" if store.has_targets else ""


def _require_same_tokens(first: TrainingSource, other: TrainingSource, *, key: str) -> None:
    for what, ours, theirs in (
        ("the tokenizer", first.tokenizer["content"][:16], other.tokenizer["content"][:16]),
        ("seq_len", first.seq_len, other.seq_len),
        ("block_size", first.store.block_size, other.store.block_size),
        ("the number of sequences", len(first), len(other)),
        ("targets.positions", first.recipe.get("positions"), other.recipe.get("positions")),
    ):
        if ours != theirs:
            raise ConfigError(
                f"{key}: {what} is {theirs} in {other.name} and {ours} in {first.name}, expected "
                "the same: generate both caches from one token store (data.dir)"
            )
    if first.recipe.get("positions") == "entropy":
        raise ConfigError(
            f"{key}: {other.name} leaves out positions by its own teacher's entropy "
            "(targets.positions=entropy), expected all or loss_mask: each teacher leaves out "
            "others, so generate again"
        )
    found = first_difference(first.recipe.get("tokens"), other.recipe.get("tokens"))
    if found:
        name, ours, theirs = found
        raise ConfigError(
            f"{key}: {other.name} was made from other tokens than {first.name}, whose {name} is "
            f"{ours!s:.60} and not {theirs!s:.60}: generate both from one token store (data.dir)"
        )
    differ = np.flatnonzero(first.store.tokens_xxh3() != other.store.tokens_xxh3())
    if len(differ):
        raise StoreError(
            f"{key}: block {differ[0]} of {other.name} holds other tokens than that of "
            f"{first.name} ({len(differ)} such blocks): generate both from one token store "
            "(data.dir)"
        )
