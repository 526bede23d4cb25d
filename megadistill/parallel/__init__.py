"""Ranks: the one place that starts DeepSpeed, lays out tp x dp, and stops the ranks together.

    with parallel.joined(tp=2) as mesh:   # ranks.py: the process group and where this rank stands
        ...                               # watchdog.py: when one rank stops, all of them do
        with parallel.graceful_stop() as stop:  # for work that ends by itself, such as saving
            while not stop.requested: ...

Works the same under `deepspeed`, `torchrun` and plain `python` (one rank). Where there is no
accelerator, DeepSpeed is told to run on the CPU before it is first imported: import deepspeed only
after importing this package.
"""

from __future__ import annotations

from megadistill.parallel.ranks import (
    Mesh,
    Unjoined,
    accounted,
    check_hosts,
    check_layout,
    choose_accelerator,
    graceful_stop,
    hosts_from_environment,
    joined,
    rank_from_environment,
    start,
)
from megadistill.parallel.watchdog import Stop

__all__ = [
    "Mesh",
    "Stop",
    "Unjoined",
    "accounted",
    "check_hosts",
    "check_layout",
    "choose_accelerator",
    "graceful_stop",
    "hosts_from_environment",
    "joined",
    "rank_from_environment",
    "start",
]
