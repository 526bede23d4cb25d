"""Device statistics of a step: memory in use, floating-point operations, share of the peak.

memory_used   bytes in use on rank 0's device, by the device's own count: everything that is not
              free, of whatever process or library, caches included. What an allocator has reserved
              and handed out says less: it knows nothing of other memory, and is never full. On a
              CPU the resident memory of rank 0's process
memory_total  bytes there are: the device's, or the host's
flops         floating-point operations of the step over all ranks, see flops.py
mfu           model FLOPs utilisation: flops a second and rank over the device's published peak.
              Only in 16 bits, and where the peak is known: on a CPU there is none
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megadistill.train.reporting.flops import Flops, peak_flops


class DeviceStats:
    """Collects device statistics. Rank 0 only."""

    def __init__(
        self, flops: Flops, *, device: torch.device, world: int, dtype: torch.dtype
    ) -> None:
        self._flops, self._device, self._world = flops, device, world
        self._peak = None
        if device.type == "cuda" and dtype.itemsize == 2:
            self._peak = peak_flops(torch.cuda.get_device_name(device))

    def step(self, *, tokens: int, labels: float, seconds: float) -> dict[str, float]:
        """Returns the statistics of a step that took `seconds`."""
        used, total = memory(self._device)
        flops = self._flops.step(tokens=tokens, labels=labels)
        found: dict[str, float] = {"memory_used": used, "memory_total": total, "flops": flops}
        if self._peak is not None:
            found["mfu"] = flops / seconds / self._world / self._peak
        return found


def memory(device: torch.device) -> tuple[int, int]:
    """Returns (used, total) in bytes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    page = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return resident * page, os.sysconf("SC_PHYS_PAGES") * page


def readings_line(record: dict[str, float]) -> str:
    """Formats the statistics as the end of a step's line."""
    used, total = (record[f"memory_{name}"] / 2**30 for name in ("used", "total"))
    mfu = f"  mfu {100 * record['mfu']:.1f} %" if "mfu" in record else ""
    return f"  mem {used:.1f}/{total:.1f} GiB{mfu}"
