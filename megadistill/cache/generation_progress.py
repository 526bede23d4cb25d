"""Progress of generating: rank 0 counts the durable blocks, and estimates the whole from the first.

The estimate is made in tokens, not in blocks: the last block may be short, and padding costs next
to nothing on disk.
"""

from __future__ import annotations

import logging
import time

from megadistill.blocks import BlockReader
from megadistill.cache.disk_guard import DiskGuard, block_bytes
from megadistill.data.counts import tokens_of_blocks
from megadistill.parallel import Mesh
from megadistill.storage.disk import readable_bytes
from megadistill.storage.durations import readable_seconds
from megadistill.storage.progress import Progress

log = logging.getLogger(__name__)


class GenerationProgress:
    """Counts durable blocks of all ranks. Rank 0 shows them; the other ranks do nothing.

    A context manager, which closes the bar.

    tokens   the token store
    missing  blocks to do
    blocks   blocks of this run's part, with those that are there
    groups   blocks that are computed at the same time
    """

    def __init__(
        self,
        mesh: Mesh,
        reserve: DiskGuard,
        tokens: BlockReader,
        store: BlockReader,
        missing: list[int],
        *,
        blocks: int,
        groups: int,
    ) -> None:
        self._mesh, self._reserve, self._store = mesh, reserve, store
        self._missing, self._blocks, self._groups = missing, blocks, min(groups, len(missing))
        self._own = self._shown = 0
        self._measured = False
        self._started = self._warm = time.monotonic()
        self._progress = None
        if mesh.rank == 0:
            self._tokens = tokens_of_blocks(tokens, missing)
            done = blocks - len(missing)
            self._progress = Progress("generate", total=blocks, unit="blocks", done=done)

    def update(self) -> None:
        """Once rank 0 has handed over a block, or gone through a round of padding."""
        self._own += 1
        if self._own == 1:
            self._warm = time.monotonic()
        self._show()

    def finish(self) -> None:
        """After the last block. Collective over all ranks."""
        self._mesh.barrier()
        self._show()

    def __enter__(self) -> GenerationProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()

    def _show(self) -> None:
        if self._progress is None:
            return
        blocks, _ = self._reserve.durable()
        self._progress.add(blocks - self._shown)
        self._shown = blocks
        if blocks and not self._measured:
            self._measured = True
            log.info("%s", self._measure())

    def _measure(self) -> str:
        """By the durable blocks' bytes, and by rank 0's pace, without its first block if it can."""
        durable = self._tokens.keys() & set(self._store.present())
        done = sum(self._tokens[block] for block in durable)
        total = sum(self._tokens.values())
        bytes_per_token = sum(block_bytes(self._store, block) for block in durable) / max(1, done)
        now = time.monotonic()
        if self._own > 1:
            blocks_per_s = (self._own - 1) * self._groups / (now - self._warm)
        else:
            blocks_per_s = max(self._own * self._groups, len(durable)) / (now - self._started)
        tokens_per_s = blocks_per_s * total / len(self._missing)
        left = bytes_per_token * (total - done)
        whole = bytes_per_token * total * self._blocks / len(self._missing)
        return (
            f"cache: {readable_bytes(whole)} when complete ({readable_bytes(left)}, about "
            f"{readable_seconds((total - done) / tokens_per_s)} remaining); "
            f"{bytes_per_token:.2f} bytes per token on disk, {tokens_per_s:,.0f} tokens/s"
        )
