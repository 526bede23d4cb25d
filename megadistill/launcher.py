"""The launcher that started this rank, and whether it is still there. Imports no torch.

`deepspeed` starts `deepspeed.launcher.launch`, which starts the ranks and outlives it: terminated,
it leaves all of them behind. So both are watched; what started them is not, since a shell may go
and leave its run behind on purpose.

A rank imports for 10 to 20 s before it can join the others, so programs watch from their first line
on (`leave_with_launcher`), until the watchdog of `parallel` takes over.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading

import psutil

log = logging.getLogger(__name__)

LOOK_S = 1.0
# What a shell gives a program that SIGHUP, SIGINT or SIGTERM ended.
HUNG_UP, INTERRUPTED, TERMINATED = 129, 130, 143
_CHAINS: dict[int, list[psutil.Process]] = {}  # by process, since a child inherits this dict
_TAKEN_OVER = threading.Event()


def launcher_is_there() -> bool:
    """Whether all are there who were at the first call: True where no launcher started us."""
    chain = _CHAINS.setdefault(os.getpid(), _chain())
    try:
        return all(p.ppid() == q.pid for p, q in itertools.pairwise(chain))
    except psutil.NoSuchProcess:
        return False


def leave_with_launcher() -> None:
    """End this process when its launcher does, from a thread, until `take_over`."""
    launcher_is_there()  # look up who it is
    if _CHAINS[os.getpid()]:
        threading.Thread(target=_watch, name="launcher-watch", daemon=True).start()


def take_over() -> None:
    """From now on the caller watches."""
    _TAKEN_OVER.set()


def _watch() -> None:
    while not _TAKEN_OVER.wait(LOOK_S):
        if not launcher_is_there():
            log.error("the launcher is gone: leaving")
            os._exit(TERMINATED)


def _chain() -> list[psutil.Process]:
    # 0: the parent is outside of this process's namespace, as after `docker exec` or `nsenter`.
    if "RANK" not in os.environ or os.getppid() in (0, 1):
        return []
    own = psutil.Process()
    parent = own.parent()
    if parent is None:
        return []
    chain = [own, parent]
    with contextlib.suppress(psutil.Error):
        above = parent.parent()
        if above is not None and _is_launcher(parent) and _is_launcher(above):
            chain.append(above)
    return chain


def _is_launcher(process: psutil.Process) -> bool:
    words = process.cmdline()[:4]
    return any("deepspeed" in word or "megadistill.launching" in word for word in words)
