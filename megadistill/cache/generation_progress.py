"""How far generating is: rank 0's bar, and what the first durable blocks say of the whole."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

from megadistill.cache.disk_guard import DiskGuard
from megadistill.parallel import Mesh
from megadistill.storage.disk import readable_bytes

log = logging.getLogger(__name__)


class Progress:
    """Rank 0's bar of durable blocks, of all ranks; on the other ranks nothing.

    blocks  that this run is to see done, with those that are there
    groups  blocks that are computed at the same time
    tokens_a_block  on average, without padding
    """

    def __init__(
        self,
        mesh: Mesh,
        reserve: DiskGuard,
        missing: list[int],
        *,
        blocks: int,
        groups: int,
        tokens_a_block: float,
    ) -> None:
        self._mesh, self._reserve, self._tokens_a_block = mesh, reserve, tokens_a_block
        self._missing, self._groups = len(missing), min(groups, len(missing))
        self._own, self._measured = 0, False
        self._started = self._warm = time.monotonic()
        self._bar = None
        if mesh.rank == 0:
            self._before = blocks - len(missing)
            self._bar = tqdm(
                total=blocks, initial=self._before, unit="block", desc="generate", mininterval=1.0
            )

    def update(self) -> None:
        """Once rank 0 has handed over a block, or gone through a round of padding."""
        self._own += 1
        if self._own == 1:
            self._warm = time.monotonic()
        self._show()

    def close(self) -> None:
        """After the last block. Collective over all ranks."""
        self._mesh.barrier()
        self._show()
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        if self._bar is None:
            return
        blocks, size = self._reserve.durable()
        self._bar.update(self._before + blocks - self._bar.n)
        if blocks and not self._measured:
            self._measured = True
            self._bar.clear()  # else the line continues the bar's
            log.info("%s", self._measure(blocks, size))

    def _measure(self, blocks: int, size: int) -> str:
        """By the durable blocks' bytes, and by rank 0's pace, without its first block if it can."""
        tokens = self._tokens_a_block
        now = time.monotonic()
        if self._own > 1:
            pace = (self._own - 1) * self._groups / (now - self._warm)
        else:
            pace = max(self._own * self._groups, blocks) / (now - self._started)
        left = self._missing - blocks
        whole = (self._before + self._missing) * size // blocks
        return (
            f"measured: {size / (blocks * tokens):.2f} bytes a token on disk, "
            f"{pace * tokens:,.0f} tokens/s; the cache will take {readable_bytes(whole)}, "
            f"{readable_bytes(left * size // blocks)} and {left / pace / 3600:.2f} hours to come"
        )
