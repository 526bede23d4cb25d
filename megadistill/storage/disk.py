"""Whether a path is on a disk here, how much room that has, and whether it is enough."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megadistill.errors import ConfigError

LESS = "do less (data.max_samples, a larger targets.tau)"


def is_url(path: str | Path) -> bool:
    """Whether `path` names a place that is reached through fsspec: `s3://bucket/cache`."""
    return "://" in str(path)


def free_bytes(path: str | Path) -> int:
    """Bytes that can still be written where `path` is, or will be."""
    return shutil.disk_usage(_nearest(path)).free


def device_of(path: str | Path) -> int:
    """A number that is equal for folders on the same disk."""
    return os.stat(_nearest(path)).st_dev


def used_bytes(path: str | Path) -> int:
    """Bytes of the files directly in `path`; 0 where there is no such folder."""
    try:
        with os.scandir(path) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())
    except OSError:
        return 0


def check_disk(
    path: str | Path, needed_bytes: int, *, key: str = "", reserve: int = 0, less: str = LESS
) -> None:
    """ConfigError where `path` has less than `needed_bytes` and the `reserve` to be left free.

    less: what makes it need less, for the message.
    """
    free = free_bytes(path)
    if needed_bytes + reserve > free:
        left = f", {readable_bytes(reserve)} of which stay free" if reserve else ""
        raise ConfigError(
            f"{key + ': ' if key else ''}{path} needs about {readable_bytes(needed_bytes)}, and "
            f"its disk has {readable_bytes(free)}{left}: make room, choose another disk, or "
            f"{less}"
        )


def readable_bytes(count: float) -> str:
    """`count` bytes with a unit: 12.3 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _nearest(path: str | Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())
