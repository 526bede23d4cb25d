"""Thousands of damaged caches: only our errors, each within a second, no memory to speak of.

    python -m tests.cache.fuzz FOLDER FIRST LAST     cases FIRST to LAST - 1 on the caches below it

A case is a function of its number. Runs in a process of its own, whose memory is limited to what it
has after importing and LIMIT more: the caches are of 10 kB, and nothing they say may cost more.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megadistill.cache.reader import open_cache
from megadistill.errors import MegadistillError
from tests.cache.mutations import Cache

LIMIT = 96 << 20  # a header of 4 MiB, the largest there may be, is 80 MiB of Python's numbers
SECONDS = 1.0  # of computing; others' load on the machine is not ours
STUCK_SECONDS = 60


def run(folder: Path, first: int, last: int) -> dict[str, Any]:
    """What came out of the cases; the numbers of those that went wrong, with the reason."""
    caches = [Cache(path) for path in sorted(folder.iterdir()) if (path / "cache.json").is_file()]
    before = [digests(cache.path) for cache in caches]
    limit_memory()
    signal.signal(signal.SIGALRM, stuck)
    result: dict[str, Any] = {"cases": 0, "refused": 0, "slowest_s": 0.0, "wrong": []}
    for number in range(first, last):
        rng = random.Random(number)
        which = rng.randrange(len(caches))
        cache = caches[which]
        unchanged = cache.damage(rng)
        signal.alarm(STUCK_SECONDS)
        started = time.process_time()
        refusals: list[str] = []
        try:
            use(cache.path, before[which] if unchanged else None, refusals)
        except Exception:  # noqa: BLE001  # every one of them is a finding
            result["wrong"].append([number, traceback.format_exc()])
        seconds = time.process_time() - started
        signal.alarm(0)
        if seconds > SECONDS:
            result["wrong"].append([number, f"took {seconds:.1f} s"])
        if any("\n" in text or len(text) > 5000 for text in refusals):
            result["wrong"].append([number, f"a message of many lines: {refusals}"[:6000]])
        result["cases"] += 1
        result["refused"] += bool(refusals)
        result["slowest_s"] = max(result["slowest_s"], seconds)
        cache.mend()
    return result


def use(path: Path, before: list[str] | None, refusals: list[str]) -> None:
    """Everything a reader does. AssertionError for a sequence that is not what it was `before`."""

    def tried(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except MegadistillError as error:
            refusals.append(str(error))
            return None

    cache = tried(lambda: open_cache(path))
    if cache is None:
        return
    for index in range(min(tried(lambda: len(cache)) or 0, 20)):
        sample = tried(lambda i=index: cache[i])
        if sample is not None and before is not None:
            assert digest(sample) == before[index], f"sequence {index} is another one"
    tried(cache.complete)
    tried(lambda: cache.num_sequences is not None and cache.store.missing())
    refusals += tried(cache.verify) or []


def digests(path: Path) -> list[str]:
    return [digest(sample) for sample in open_cache(path)]


def digest(sample: dict[str, Any]) -> str:
    """A hash of everything a sample says."""
    found = hashlib.md5(usedforsecurity=False)
    for name, value in sorted({**sample, **vars(sample["targets"])}.items()):
        if name != "targets":
            text = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
            found.update(name.encode() + text)
    return found.hexdigest()


def limit_memory() -> None:
    """Let this process have LIMIT more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def stuck(signal_number: int, frame: object) -> None:
    raise TimeoutError(f"a case takes longer than {STUCK_SECONDS} s")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))) + "\n")
