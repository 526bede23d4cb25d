"""Reading a cache: sequences with their targets, every one verified before it is returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megadistill.blocks import BlockReader, open_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.blocks.remote.shard_cache import LocalCopies
from megadistill.cache.codec import decode_targets
from megadistill.cache.content_hash import content_hash
from megadistill.cache.ranking import ranking_of
from megadistill.cache.recorded_method import method_of
from megadistill.cache.statistics import Statistics, block_statistics, combine
from megadistill.errors import CorruptBlockError, StoreError

Sample = dict[str, Any]


class Cache:
    """A cache of teacher targets; cache[i] is sequence i.

    tokens     uint32 [T]
    documents  uint32 [D], where documents start
    loss_mask  uint8 [T], where the data has one
    padding    int, tokens of padding at the end; in stores that were packed with padding
    targets    SparseTargets of T positions, as numpy arrays; as torch tensors where a device was
               given: the packed bytes travel to it, and are taken apart there
    """

    def __init__(self, store: BlockReader, *, device: Any = None) -> None:
        if store.kind != "cache":
            raise StoreError(
                f"{store.path}: is a store of kind {store.kind}, expected a cache: generate one "
                "from it with launch/generate.py"
            )
        vocab_size = store.recipe.get("vocab_size")
        if type(vocab_size) is not int or not 0 < vocab_size <= 1 << 32:
            raise CorruptBlockError(
                str(store.layout.header("cache")), "recipe.vocab_size from 1 to 2^32", vocab_size
            )
        self.method = method_of(store)
        self.store, self.vocab_size, self.device = store, vocab_size, device
        self.ranking = ranking_of(store, vocab_size=vocab_size)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Sample:
        return self._decoded(self.store[index], index)

    def __iter__(self) -> Iterator[Sample]:
        for block in self.store.committed():
            yield from self.block(block)

    @property
    def path(self) -> Path:
        return self.store.path

    @property
    def header(self) -> dict[str, Any]:
        """cache.json."""
        return self.store.header

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything the cache's bytes depend on."""
        return self.store.recipe

    @property
    def num_sequences(self) -> int | None:
        """Sequences of the complete cache."""
        return self.store.num_sequences

    def complete(self) -> bool:
        """Whether every block is there. See BlockReader.complete."""
        return self.store.complete()

    def block(self, block: int) -> list[Sample]:
        """All sequences of a block."""
        first = block * self.store.block_size
        return [self._decoded(s, first + i) for i, s in enumerate(self.store.block(block))]

    def statistics(self) -> Statistics:
        """The statistics of all committed blocks together, from their markers."""
        return combine([self.store.marker(b)["statistics"] for b in self.store.committed()])

    def verify(
        self, *, workers: int = 1, progress: Callable[[int], object] | None = None
    ) -> list[str]:
        """Check every byte, decode every target, recompute every statistic; what is wrong."""
        return verify_store(self.store, workers=workers, progress=progress, check=self.check)

    def check(self, samples: list[Sample], marker: dict[str, Any]) -> list[str]:
        """Returns the errors in a block's content, targets or statistics, a line each."""
        block = marker["block"]
        first = block * self.store.block_size
        decoded = [self._decoded(s, first + i)["targets"].numpy() for i, s in enumerate(samples)]
        found = block_statistics(decoded, [len(s["targets"]) for s in samples])
        file, claimed = self.store.layout.marker(block), marker["statistics"]
        content, named = content_hash(samples), marker["content_hash"]
        wrong = (
            []
            if content == named
            else [f"{file}: content_hash: expected {content} from the shard, found {named}"]
        )
        return wrong + [
            f"{file}: statistics.{ascii(key)[1:-1]:.60}: "
            f"expected {found.get(key)!s:.80}, found {claimed.get(key)!s:.80}"
            for key in sorted(found.keys() | claimed.keys())
            if found.get(key) != claimed.get(key)
        ]

    def _decoded(self, sample: Sample, index: int) -> Sample:
        file = f"{self.store.layout.shard(index // self.store.block_size)}, sequence {index}"
        targets = decode_targets(
            sample["targets"],
            vocab_size=self.vocab_size,
            ranking=self.ranking,
            file=file,
            device=self.device,
        )
        if len(targets) != len(sample["tokens"]):
            raise CorruptBlockError(file, f"{len(sample['tokens'])} positions", len(targets))
        for name in ("method", "temperature"):
            found, wanted = getattr(targets, name), self.recipe.get(name)
            if found != wanted:
                raise CorruptBlockError(file, f"{name} {str(wanted)[:40]}", found)
        padding = int(sample.get("padding", 0))
        if padding and int(targets.offsets[-1 - min(padding, len(targets))]) != len(targets.ids):
            raise CorruptBlockError(file, "no targets in padding", "some")
        return {k: v for k, v in sample.items() if k != "sum"} | {"targets": targets}


def open_cache(path: str | Path, *, device: Any = None, local: LocalCopies | None = None) -> Cache:
    """The cache in a folder or at a URL. StoreError, CorruptBlockError.

    device  torch's: where the targets are wanted; None: numpy arrays
    local   where shards of a remote store are kept, see open_store
    """
    return Cache(open_store(path, local=local), device=device)
