"""The stores a student learns from, and micro-batches of their sequences.

A store is a cache, or a token store where there is nothing to distil (loss.kd_weight=0).

Shapes: B sequences of a micro-batch, T positions, N = B*T.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megadistill.blocks import BlockReader, open_store
from megadistill.blocks.remote.shard_cache import LocalCopies, default_folder
from megadistill.cache.reader import Cache
from megadistill.cache.recorded_settings import pack_of
from megadistill.config import CacheConfig, Config
from megadistill.config.curves import values
from megadistill.data.learned import has_labels, nothing_learned, warn_of_few
from megadistill.errors import ConfigError, DataError, StoreError
from megadistill.models.attention import forward_inputs
from megadistill.models.documents_apart import DocumentsApart, runs_apart
from megadistill.models.packed_sequences import IGNORED, sample_labels
from megadistill.student.features import Features
from megadistill.targets import SparseTargets, concatenate
from megadistill.targets.ensemble import Ensemble
from megadistill.targets.kinds import AnyTargets, Member, Targets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSource:
    """A store to train or evaluate on. `sequences[i]` is a sequence's columns, verified.

    An unfinished store gives the sequences of some blocks, numbered without a gap.
    """

    source: Any  # Cache or BlockReader
    store: BlockReader
    has_targets: bool
    weight: float = 1.0  # passes over it in an epoch
    blocks: tuple[int, ...] | None = None  # of an unfinished store, ascending
    online: dict[str, Any] | None = None  # the recipe of targets that the online teacher gives
    other_teachers: tuple[TrainingSource, ...] = ()  # what other teachers say of the same sequences
    teacher_weight: float = 1.0  # of its teacher, where there are several
    key: str = "cache.dir"  # where the configuration names it

    def __len__(self) -> int:
        if self.blocks is None:
            return len(self.store)
        # Not by the store, which may grow meanwhile.
        last = int(self.store.marker(self.blocks[-1])["sequences"])
        return (len(self.blocks) - 1) * self.store.block_size + last

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.number(index)]

    def number(self, index: int) -> int:
        """Returns the number that the store itself gives a sequence."""
        if self.blocks is None:
            return index
        block, row = divmod(index, self.store.block_size)
        return self.blocks[block] * self.store.block_size + row

    @property
    def name(self) -> str:
        return self.store.name

    @property
    def is_remote(self) -> bool:
        return self.store.is_remote

    @property
    def recipe(self) -> dict[str, Any]:
        return self.store.recipe if self.online is None else self.online

    @property
    def reads_targets(self) -> bool:
        """Whether the store holds the targets."""
        return self.has_targets and self.online is None

    @property
    def tokenizer(self) -> dict[str, Any]:
        return self.recipe["tokenizer"]

    @property
    def seq_len(self) -> int:
        return int(self.recipe["seq_len"])

    @property
    def vocab_size(self) -> int:
        """Number of ids that may occur: the teachers', or the tokenizer's without a teacher."""
        own = int(self.recipe.get("vocab_size") or self.tokenizer["vocab_size"])
        return max([own, *(other.vocab_size for other in self.other_teachers)])


def open_sequences(
    path: str,
    *,
    key: str,
    with_targets: bool,
    weight: float = 1.0,
    local: LocalCopies | None = None,
    blocks: tuple[int, ...] | None = None,
) -> TrainingSource:
    """Opens the complete store at `path`. `key`: the configuration key, for messages.

    `local`: see open_store. `blocks`: the blocks to read of an unfinished store.
    Raises ConfigError for a token store if targets are needed. Raises StoreError for a missing or
    empty store, an incomplete one, or missing blocks.
    """
    store = open_store(path, local=local)
    if with_targets and store.kind != "cache":
        raise ConfigError(
            f"{key}: {store.name} is a token store, without targets: generate a cache from it, or "
            "set loss.kd_weight=0 loss.ce_weight=1 to train on its text alone"
        )
    if len(store) == 0:
        raise StoreError(f"{key}: {store.name} holds no sequence yet: run launch/generate.py first")
    if blocks is None and not store.complete():
        raise StoreError(f"{key}: {store.name} is {_incomplete(store, key)}")
    gone = set(blocks or ()) - set(store.committed())
    if gone:
        raise StoreError(
            f"{key}: {store.name} has no block {min(gone)}, on which this run was begun: generate "
            "again, and it is made, or choose another train.out_dir to start anew"
        )
    has_targets = store.kind == "cache"
    source = Cache(store) if has_targets else store
    return TrainingSource(source, store, has_targets, weight, blocks)


def _incomplete(store: BlockReader, key: str) -> str:
    """Returns a message that tells what a store lacks, and what completes it."""
    lost = [] if store.is_remote else store.lost_shards()
    if lost:
        return (
            f"damaged, {lost[0]} is missing or of another size ({len(lost)} such shard(s)): run "
            f"`python tools/merge_and_inspect.py --repair {store.name}`, then the command that "
            "made it again"
        )
    ask = "; or train on what is there, cache.allow_incomplete=true" if key == "cache.dir" else ""
    if not store.is_remote and store.num_sequences is not None and not store.missing():
        return (
            "damaged: all its blocks are there, but blocks.bin or index.json is missing or not as "
            f"they say: run `python tools/merge_and_inspect.py --repair {store.name}`, which "
            "writes both anew"
        )
    return (
        f"incomplete, {_extent(store, len(store))}: run the command that made it again, it goes "
        f"on where it stopped{ask}"
    )


def _extent(store: BlockReader, count: int) -> str:
    return f"{count}{'' if store.num_sequences is None else f' of {store.num_sequences}'} sequences"


def open_sources(
    config: Config, blocks: list[tuple[int, ...] | None] | None = None
) -> list[TrainingSource]:
    """Opens every store of cache.dir. Raises ConfigError, naming both, if two do not mix.

    blocks: the blocks to read of each store, None for a store that must be complete.
    """
    sources = config.cache.sources
    stores = [
        open_sequences(
            source.dir,
            key="cache.dir",
            with_targets=config.loss.learns_from_teacher,
            weight=source.weight,
            local=local_copies(config.cache),
            blocks=chosen,
        )
        for source, chosen in zip(sources, blocks or [None] * len(sources), strict=True)
    ]
    for store in stores[1:]:
        _require_mixable(stores[0], store)
    return stores


def require_targets(config: Config, stores: list[TrainingSource]) -> None:
    """Raises DataError if no position of any store has a label that the loss learns from."""
    alone = config.loss.learns_from_teacher and not any(values(config.loss.ce_weight))
    for store in stores:
        with_targets = alone and store.reads_targets
        samples = (store[i] for i in range(len(store)))
        if any(_learns(sample, with_targets=with_targets) for sample in samples):
            continue
        if not with_targets:
            raise DataError(nothing_learned(store.store, key=store.key))
        raise DataError(
            f"{store.key}: {store.name}: no label of its {len(store)} sequence(s) has a target, so "
            "that there is nothing to learn from the teacher: generate with other "
            "targets.positions, or a lower targets.min_entropy, into another cache.dir"
        )
    for store in stores:
        _warn_of_few(store)


def _learns(sample: dict[str, Any], *, with_targets: bool) -> bool:
    if not with_targets:
        return has_labels(sample)
    return bool(((sample_labels(sample) != IGNORED) & (sample["targets"].counts > 0)).any())


def _warn_of_few(store: TrainingSource) -> None:
    if store.is_remote or store.recipe.get("positions") != "loss_mask":
        return
    markers = (store.store.marker(block) for block in store.store.committed())
    learned = sum(int(m["statistics"].get("positions", 0)) for m in markers)
    warn_of_few(learned, len(store.store) * store.seq_len, name=store.name, key=store.key)


def blocks_there(config: Config) -> list[tuple[int, ...] | None]:
    """Returns the blocks of each store of cache.dir, or None for a complete store."""
    found: list[tuple[int, ...] | None] = []
    for source in config.cache.sources:
        store = open_store(source.dir, local=local_copies(config.cache))
        blocks = tuple(store.committed())
        if not blocks or store.complete():
            found.append(None)
            continue
        found.append(blocks)
        log.warning(
            "%s is incomplete: the run trains on the %s it has now, and keeps to them "
            "(cache.allow_incomplete)",
            store.name,
            _extent(store, len(store)),
        )
    return found


def local_copies(cache: CacheConfig) -> LocalCopies:
    """Returns the folder that keeps shards of remote stores, and its limit."""
    folder = cache.local_dir
    return LocalCopies(
        default_folder() if folder is None else Path(folder).expanduser(),
        int(cache.local_limit * 2**30),
    )


def _require_mixable(first: TrainingSource, other: TrainingSource) -> None:
    packs = pack_of(first.recipe), pack_of(other.recipe)
    for what, ours, theirs in (
        ("tokenizer", first.tokenizer["content"], other.tokenizer["content"]),
        ("seq_len", first.seq_len, other.seq_len),
        ("vocab_size", first.vocab_size, other.vocab_size),
        ("data.pack", *(packs if all(packs) else ("", ""))),  # unless a recipe does not say
        ("kind", first.store.kind, other.store.kind),
    ):
        if ours != theirs:
            raise ConfigError(
                f"cache.dir: {what} is {_short(ours)} in {first.name} and {_short(theirs)} in "
                f"{other.name}, expected one: train from caches that agree in it"
            )


def _short(value: object) -> str:
    return "absent" if value is None else str(value)[:16]


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass: numpy arrays, until `on` copies them to a device.

    names: (store, sequence) of each row. padding_B: int64, tokens of padding at each row's end.
    kd_count, ce_count: positions in each term. kd_entropy: nats that the distillation term exceeds
    its KL by, summed over kd_count positions; nan where that is not known. features: of an online
    teacher, on its device.
    """

    names: list[tuple[int, int]]
    tokens_BT: np.ndarray
    documents: list[np.ndarray]
    labels_N: Any  # int64
    targets: AnyTargets | None
    kd_count: int
    ce_count: int
    padding_B: np.ndarray
    kd_entropy: float = 0.0
    inputs: dict[str, Any] = field(default_factory=dict)
    features: Features | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of documents, without padding."""
        return self.tokens_BT.size - int(self.padding_B.sum())

    def on(self, model: nn.Module, device: torch.device, *, pack: Any) -> MicroBatch:
        """Returns the keyword arguments of `Student.forward` as tensors on `device`."""
        inputs: dict[str, Any]
        if runs_apart(model, pack):
            apart = DocumentsApart.of(self.tokens_BT, self.documents, device=device)
            inputs = {"apart": apart}
        else:
            inputs = forward_inputs(model, self.tokens_BT, self.documents, pack=pack, device=device)
        return replace(
            self,
            inputs=inputs,
            labels_N=torch.as_tensor(self.labels_N, device=device),
            targets=None if self.targets is None else self.targets.torch(device),
        )


def micro_batch(
    stores: list[TrainingSource],
    names: list[tuple[int, int]],
    *,
    with_targets: bool,
    empty: int = 0,
) -> MicroBatch:
    """Reads the named sequences. The last `empty` of them fill the shape only."""
    samples = [stores[store][sequence] for store, sequence in names]
    labels_BT = np.stack([sample_labels(s) for s in samples])
    if empty:
        labels_BT[-empty:] = -100
    labels_N = labels_BT.reshape(-1)
    valid_N = labels_N != -100
    targets: Targets | None = None
    if with_targets:
        parts = [s["targets"] for s in samples]
        if stores[0].other_teachers:
            targets = _of_all_teachers(stores[0], parts, names, valid_N)
        else:
            targets = joined(parts)
    return MicroBatch(
        names=names,
        tokens_BT=np.stack([s["tokens"] for s in samples]),
        documents=[s["documents"] for s in samples],
        labels_N=labels_N,
        targets=targets,
        kd_count=0 if targets is None else int((valid_N & targets.has_targets()).sum()),
        ce_count=int(valid_N.sum()),
        kd_entropy=0.0 if targets is None else targets.entropy_sum(valid_N),
        padding_B=np.array([int(s.get("padding", 0)) for s in samples], np.int64),
    )


def joined(parts: list[SparseTargets]) -> Targets:
    """Concatenates the targets of all sequences.

    Returns an Ensemble for caches of several methods, with a member for each method; rows of other
    methods are empty in it.
    """
    parts = [_without_notes(part) for part in parts]
    if any(part.entropy is None for part in parts):
        parts = [replace(part, entropy=None) for part in parts]
    if any(part.nll is None for part in parts):
        parts = [replace(part, nll=None) for part in parts]
    ways = list(dict.fromkeys((part.method, part.temperature) for part in parts))
    if len(ways) == 1:
        return concatenate(parts)
    return Ensemble.of_parts(
        [
            concatenate([p if (p.method, p.temperature) == way else _empty(p, way) for p in parts])
            for way in ways
        ]
    )


def _empty(part: SparseTargets, way: tuple[str, float]) -> SparseTargets:
    """Returns empty targets for as many positions, of another method and temperature."""
    method, temperature = way
    none = part.rows(0, 0)
    return replace(
        none,
        offsets=np.zeros_like(part.offsets),
        tail=np.zeros_like(part.tail),
        method=method,
        temperature=temperature,
        entropy=None,
        nll=None,
        rounding=None,
    )


def _of_all_teachers(
    store: TrainingSource,
    parts: list[SparseTargets],
    names: list[tuple[int, int]],
    valid_N: np.ndarray,
) -> Ensemble:
    """Returns the targets of all teachers for the same sequences. StoreError if they do not fit."""
    targets = concatenate([_without_notes(part) for part in parts])
    members: list[Member] = [targets]
    for other in store.other_teachers:
        theirs = concatenate([_without_notes(other[i]["targets"]) for _, i in names])
        if (valid_N & (theirs.has_targets() != targets.has_targets())).any():
            raise StoreError(
                f"{other.key}: {other.name} has targets at other positions than {store.name}, in "
                f"one of the sequences {', '.join(str(i) for _, i in sorted(names))}: generate "
                "both from one token store (data.dir), with the same targets.positions"
            )
        members.append(theirs)
    return Ensemble.of(members, [s.teacher_weight for s in (store, *store.other_teachers)])


def _without_notes(targets: SparseTargets) -> SparseTargets:
    # How an entry was chosen is for statistics; the loss needs entries and tail.
    return replace(targets, heads=None, truth_added=None, rounding=None)
