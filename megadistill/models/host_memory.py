"""Returns freed host memory to the system at once, while a model is partitioned.

glibc serves pieces from its heap up to the size of the largest that was freed, at most 32 MiB. A
rank that partitions a model frees each whole weight after it has made its share of it, and shares
that lie between the holes keep the heap from shrinking: of a model with 1.3 GB a rank, 2.3 GB were
held. Inside, pieces of 1 MiB and more are mapped one by one, and go where they came from: 1.4 GB.
Not for always: fresh pages cost time, more than the arithmetic where buffers come and go.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD
_USUAL = 32 << 20  # where glibc itself stops raising it
_INSIDE = 1 << 20


@contextlib.contextmanager
def return_freed_memory() -> Iterator[None]:
    """Inside, freed memory returns to the system at once. No effect without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_THRESHOLD, _INSIDE)
    try:
        yield
    finally:
        mallopt(_THRESHOLD, _USUAL)
