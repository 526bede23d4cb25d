"""Ranks: the one place that starts DeepSpeed, lays out tp x dp, and stops the ranks together.

    with parallel.joined(tp=2) as mesh:   # ranks.py: the process group and where this rank stands
        ...                               # watchdog.py: when one rank stops, all of them do
        with parallel.told_to_stop() as told:   # for work that ends by itself, such as saving
            ...

Works the same under `deepspeed`, `torchrun` and plain `python` (one rank). Where there is no
accelerator, DeepSpeed is told to run on the CPU before it is first imported: import deepspeed only
after importing this package.
"""

from __future__ import annotations

from megadistill.parallel.ranks import (
    Mesh,
    check_layout,
    choose_accelerator,
    joined,
    rank_from_environment,
    start,
    told_to_stop,
)

__all__ = [
    "Mesh",
    "check_layout",
    "choose_accelerator",
    "joined",
    "rank_from_environment",
    "start",
    "told_to_stop",
]
