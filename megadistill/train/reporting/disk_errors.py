"""Errors of a full or unwritable disk, as one line instead of a traceback.

Files of a run are written by torch, DeepSpeed, safetensors and ourselves, and each has an error of
its own for it. What they wrote so far is no checkpoint yet, so the run resumes from the last one.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from megadistill.errors import TrainError
from megadistill.storage.disk import free_bytes, readable_bytes

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
# torch.save checks how far it has written, and says only that.
_OF_TORCH = ("PytorchStreamWriter", "inline_container.cc")


@contextmanager
def disk_errors(folder: str) -> Iterator[None]:
    """Raises TrainError, naming the file if known, for a failed write under `folder`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        why = _reason(error)
        if why is None:
            raise
        where = getattr(error, "filename", None) or folder
        raise TrainError(
            f"train.out_dir: {where}: cannot be written: {why}; the disk has "
            f"{readable_bytes(free_bytes(folder))} free: make room and run again, it resumes from "
            "the last checkpoint"
        ) from error


def _reason(error: Exception) -> str | None:
    """Returns the reason of a disk error; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _DISK else None
    if any(name in str(error) for name in _OF_TORCH):
        return "a file could not be written to its end"
    return "No space left on device" if "No space left on device" in str(error) else None
