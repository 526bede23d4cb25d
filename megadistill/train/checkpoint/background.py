"""Checkpoints that are written while training continues.

A save first makes each file in host memory, as DeepSpeed lays it out: from then on nothing that
training does can change it, and the next step begins. A thread writes the files; when those of all
ranks have reached their places, rank 0's thread brings them to disk and seals them (checkpoint/).
Until then they lie under a name that is no checkpoint's, so that a run that dies meanwhile leaves
the one before, whole. Costs host memory for one checkpoint's part of a rank, 12 bytes a parameter
over the ranks and 4 with an average, until it is written.

One save at a time: the next waits for the one before, and raises its error.

DeepSpeed's own writers (`deepspeed.checkpoint.writer`) are refused, see config/deepspeed_keys.py.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megadistill.errors import MegadistillError, TrainError
from megadistill.parallel import Mesh
from megadistill.storage.files import LOCAL

_POLL_S = 0.05
_PATIENCE_S = 10.0  # for a save that is under way when a run ends with an error
_SAVES = itertools.count()  # names one save on all ranks


class Background:
    """Holds one rank's files of the save in progress, and the thread that writes them."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        def save(state_dict: Any, path: str) -> None:
            self.put(state_dict, Path(path))

        engine.checkpoint_engine.save = save  # of this instance
        self._mesh, self._files = mesh, list[tuple[Path, io.BytesIO]]()
        self._thread: threading.Thread | None = None
        self._failed: Exception | None = None
        self.took_s: float | None = None  # the last save, until rank 0 had sealed it

    def put(self, state: Any, path: Path) -> None:
        """Serializes `state` into memory with torch.save; `start` writes it to `path`."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._files.append((path, buffer))

    def start(self, seal: Callable[[], None]) -> None:
        """Writes the files of `put`; rank 0 calls seal() when all ranks have."""
        files, self._files = self._files, []
        self._thread = threading.Thread(
            target=self._run, args=(files, next(_SAVES), seal), name="checkpoint", daemon=True
        )
        self._thread.start()

    def sealed(self) -> Callable[[], bool]:
        """Returns a function that tells whether the save in progress has been written."""
        thread = self._thread
        return lambda: thread is None or not (thread.is_alive() or self._failed)

    def wait(self) -> None:
        """Waits until the save in progress is sealed; raises its error on all ranks. Collective."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._mesh.run_on_rank0(self._raise)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        # A save that is under way when a run ends with an error may come to its end.
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)

    def _raise(self) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _run(
        self, files: list[tuple[Path, io.BytesIO]], number: int, seal: Callable[[], None]
    ) -> None:
        began = time.monotonic()
        keys = [f"megadistill/saved/{number}/{rank}" for rank in range(self._mesh.world)]
        said = _written(files)
        with contextlib.suppress(dist.DistError):  # rank 0 is gone: the watchdog stops this one
            self._mesh.store.set(keys[self._mesh.rank], said)
        if self._mesh.rank == 0:
            try:
                self._gather(keys)
                seal()
                self.took_s = time.monotonic() - began
            except Exception as error:  # noqa: BLE001 - raised by `wait`, whatever it is
                self._failed = error

    def _gather(self, keys: list[str]) -> None:
        """Waits for all ranks' files. Raises TrainError if a rank could not write them."""
        while not self._mesh.store.check(keys):
            time.sleep(_POLL_S)
        failed = next((said for key in keys if (said := self._mesh.store.get(key))), b"")
        for key in keys:
            self._mesh.store.delete_key(key)
        if failed:
            raise TrainError(failed.decode())


def _written(files: list[tuple[Path, io.BytesIO]]) -> str:
    """Writes the files. Returns the error, or an empty text."""
    try:
        for path, buffer in files:
            LOCAL.unlink(path)  # DeepSpeed may have made it, empty
            LOCAL.write_new(path, buffer.getbuffer())
    except Exception as error:  # noqa: BLE001 - rank 0 waits for an answer, whatever happens
        return str(error) if isinstance(error, MegadistillError) else repr(error)
    finally:
        files.clear()
    return ""
