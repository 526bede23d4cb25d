"""Writing a cache beside the teacher: one block is computed while another is written.

Encoding, statistics, checksums and fsync run in a thread, so that they cost the teacher no time as
long as they are faster than it. `submit` waits while `depth` blocks are in the thread's hands:
memory stays bounded, and a slow disk slows the teacher down instead of filling the memory.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from megadistill.blocks import BlockWriter
from megadistill.cache.codec import NonFiniteError, decode_targets, encode_targets
from megadistill.cache.content_hash import content_hash
from megadistill.cache.ranking import ranking_of
from megadistill.cache.statistics import block_statistics
from megadistill.errors import TeacherError
from megadistill.targets import SparseTargets

Sample = dict[str, Any]
_Block = tuple[int, list[Sample], list[SparseTargets]]


class CacheWriter:
    """Commits blocks in a thread. Use as a context manager; leaving it waits for the last block.

    made_with  goes into every marker: versions and hardware the block was made with
    depth      blocks encoded or written at once, at most; `submit` waits for the oldest
    on_commit  called in the thread with a block's number, once the block is durable
    on_error   called in the thread with what went wrong, which is then the caller's to raise

    What goes wrong in the thread is raised at the next `submit` or at the end, unless there is an
    `on_error`. Nothing more is written after it.
    """

    def __init__(
        self,
        store: BlockWriter,
        *,
        made_with: dict[str, Any] | None = None,
        depth: int = 1,
        on_commit: Callable[[int], object] | None = None,
        on_error: Callable[[BaseException], object] | None = None,
    ) -> None:
        self._store = store
        self._vocab_size = int(store.recipe["vocab_size"])
        self._ranking = ranking_of(store, vocab_size=self._vocab_size)
        self._made_with = made_with or {}
        self._on_commit, self._on_error = on_commit, on_error
        self._free = threading.Semaphore(depth)
        self._queue: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> CacheWriter:
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._thread is not None
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def submit(self, block: int, samples: list[Sample], targets: list[SparseTargets]) -> None:
        """Hand over a block: its sequences (tokens, documents, loss_mask) and their targets.

        targets are numpy, one for each sequence, one position for each token. Raises what an
        earlier block ran into: TeacherError naming the sequence for values that are not finite,
        StoreError.
        """
        if self._thread is None:
            raise RuntimeError("a CacheWriter takes blocks between `with` and its end")
        self._free.acquire()
        self._raise()
        self._queue.put((block, samples, targets))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._write(*item)
            except BaseException as error:  # noqa: BLE001  # raised in the caller's thread
                self._error = error
                if self._on_error:
                    self._on_error(error)
            finally:
                self._free.release()

    def _write(self, block: int, samples: list[Sample], targets: list[SparseTargets]) -> None:
        first = block * self._store.block_size
        data = [self._encoded(t, first + i) for i, t in enumerate(targets)]
        # Decoded again: statistics are of what will be read, and nothing unreadable is committed.
        decoded = [
            decode_targets(d, vocab_size=self._vocab_size, ranking=self._ranking) for d in data
        ]
        full = [s | {"targets": d} for s, d in zip(samples, data, strict=True)]
        for sample, target in zip(samples, targets, strict=True):
            if len(target) != len(sample["tokens"]):
                raise ValueError(f"{len(target)} targets for {len(sample['tokens'])} tokens")
            padding = int(sample.get("padding", 0))
            if padding and target.counts[-padding:].any():
                raise ValueError(f"targets in the {padding} tokens of padding, expected none")
        self._store.commit(
            block,
            full,
            statistics=block_statistics(decoded, [len(d) for d in data]),
            content_hash=content_hash(full),
            made_with=self._made_with,
        )
        if self._on_commit:
            self._on_commit(block)

    def _encoded(self, targets: SparseTargets, sequence: int) -> bytes:
        try:
            return encode_targets(targets, vocab_size=self._vocab_size, ranking=self._ranking)
        except NonFiniteError as error:
            raise TeacherError(
                f"sequence {sequence}, position {error.position}: the teacher's {error.name} is "
                f"{error.value}, expected a finite number that is not negative: try "
                "teacher.dtype=float32, or leave the document out"
            ) from error

    def _raise(self) -> None:
        if self._error is not None and self._on_error is None:
            raise self._error
