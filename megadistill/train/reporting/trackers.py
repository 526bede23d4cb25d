"""Experiment trackers: the metrics of a run in TensorBoard, Weights & Biases and trackio.

    run's loop -> Reporter -> metrics.jsonl, eval.jsonl
                           -> Trackers -> a queue and a thread each -> the tracker's own library

A tracker must not delay or end a run: rank 0 only puts metrics into a queue, and a thread for each
tracker takes them out. An error or a hang of its library is logged once, and the run continues
without the tracker. metrics.jsonl and eval.jsonl hold everything in any case.

A resumed run continues the same curve. Of the steps that are done again
    tensorboard  draws the new ones over the old ones: events from the resumed step on are purged
    wandb        keeps those it was given first; it takes no step twice, nor one before its last
    trackio      keeps those it was given first; given twice they would be drawn twice, so that
                 they are left out here, for both
What a tracker had not written when its run was killed is missing there.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megadistill.config import Config
from megadistill.errors import ConfigError, StoreError
from megadistill.storage.files import LOCAL
from megadistill.storage.records import encode_json, put_file, read_json

log = logging.getLogger(__name__)

QUEUED = 1000  # records that a tracker may be behind
PATIENCE_S = 60.0  # for what is queued when a run is finished
HURRY_S = 5.0  # when it was stopped, or failed

Metrics = dict[str, float]
_IMPORTED = {"tensorboard": "torch.utils.tensorboard"}  # what brings the rest; else the package


def check_trackers(names: Sequence[str], *, load: bool = False) -> None:
    """ConfigError, a line each, for trackers whose library is not installed.

    load: import them as well, and refuse what cannot be.
    """
    lines = []
    for name in names:
        way_out = f"pip install {name}, or leave {name} out of train.trackers"
        if importlib.util.find_spec(name) is None:
            lines.append(
                f"train.trackers: {name} needs the package {name}, which is not installed: "
                f"{way_out}"
            )
        elif load:
            try:
                importlib.import_module(_IMPORTED.get(name, name))
            except Exception as error:  # noqa: BLE001 - whatever a package does when imported
                lines.append(
                    f"train.trackers: the package {name} cannot be imported "
                    f"({_shown(error)}): {way_out}"
                )
    if lines:
        raise ConfigError("\n".join(lines))


@dataclass(frozen=True)
class Setup:
    """Settings that a tracker is started with."""

    folder: Path  # the run's
    project: str
    name: str
    id: str  # of this run at this tracker, kept in the folder
    known: bool  # whether the tracker has been given this run before
    done: int  # steps, of a resumed run
    settings: dict[str, Any]  # the whole configuration


class Tracker(Protocol):
    """Interface to each tracker's library. May raise anything, or hang."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self, *, failed: bool) -> None: ...

    @staticmethod
    def leave() -> None:
        """Keeps the library from delaying the end of the process."""


class TensorBoard:
    """Event files in the run's folder, under tensorboard/."""

    def __init__(self, setup: Setup) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(setup.folder / "tensorboard"), purge_step=setup.done + 1, flush_secs=10
        )
        if not setup.done:
            self._writer.add_text("configuration", _as_markdown(setup.settings))

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()

    @staticmethod
    def leave() -> None:
        pass  # its thread is a daemon


class WandB:
    """A run of Weights & Biases, its files in the run's folder, under wandb/."""

    def __init__(self, setup: Setup) -> None:
        import wandb

        self._run = wandb.init(
            project=setup.project,
            name=setup.name,
            id=setup.id,
            resume="allow",
            dir=str(setup.folder),
            config=setup.settings,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        self.leave()

    @staticmethod
    def leave() -> None:
        # It would otherwise wait for its service when the interpreter ends, however long that
        # takes. This waits, too, but takes that hook out first.
        import wandb

        wandb.teardown()


class Trackio:
    """A run of trackio, where trackio keeps its projects (TRACKIO_DIR)."""

    def __init__(self, setup: Setup) -> None:
        import trackio

        self._run = trackio.init(
            project=setup.project,
            name=setup.name,
            config=setup.settings,
            # By name, of which there may be several: that which was begun last is continued.
            resume="allow" if setup.known else "never",
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()

    @staticmethod
    def leave() -> None:
        pass  # what it does at the end, it does for runs of the main thread


TRACKERS: dict[str, type[TensorBoard | WandB | Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
_DRAW_OVER = {"tensorboard"}


class Feed:
    """Feeds one tracker from a thread. Nothing here raises, or waits for the tracker."""

    def __init__(
        self, name: str, setup: Setup, *, given: dict[str, int], begun: Callable[[], None]
    ) -> None:
        """given: by kind of metrics, the last step that the tracker has. begun: called once."""
        self.name, self._setup, self._given, self._begun = name, setup, given, begun
        self._queue: queue.Queue[tuple[int, Metrics] | None] = queue.Queue(QUEUED)
        self._failed = False  # the run, not the tracker
        self._lost = False
        self._thread = threading.Thread(target=self._serve, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, kind: str, step: int, metrics: Metrics) -> None:
        if self._lost or step <= self._given.get(kind, 0):
            return
        try:
            self._queue.put_nowait((step, metrics))
        except queue.Full:
            self._lose(f"has accepted none of the last {QUEUED} records, at step {step}")

    def end(self, *, failed: bool) -> None:
        """Closes the queue; the thread ends by itself, and `wait` tells whether it did."""
        self._failed = failed
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._lose(f"has accepted none of the last {QUEUED} records")

    def wait(self, until: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._lose("is not done with what it was given")

    def _serve(self) -> None:
        step = self._setup.done
        try:
            tracker: Tracker | None = None
            while (item := self._queue.get()) is not None and not self._lost:
                step, metrics = item
                if tracker is None:  # until there are figures, there is nothing to show
                    tracker = TRACKERS[self.name](self._setup)
                    self._begun()
                tracker.log(step, metrics)
            if tracker is not None:
                tracker.close(failed=self._failed)
        except BaseException as error:  # noqa: BLE001 - nothing of a tracker's ends a run
            self._lose(f"failed at step {step} ({_shown(error)})")

    def _lose(self, how: str) -> None:
        if self._lost:
            return
        self._lost = True
        log.warning(
            "train.trackers: %s %s: the run continues without it, and %s has every record",
            self.name,
            how,
            self._setup.folder,
        )
        leaving = threading.Thread(target=self._leave, daemon=True)
        leaving.start()
        leaving.join(1.0)

    def _leave(self) -> None:
        with contextlib.suppress(BaseException):
            TRACKERS[self.name].leave()


class Trackers:
    """The trackers of a run, on rank 0."""

    def __init__(self, config: Config, folder: Path, *, done: int, given: dict[str, int]) -> None:
        """done: steps, of a resumed run; given: the last step of each kind that it had reported."""
        train, known = config.train, Known(folder / "trackers.json")
        self._feeds = []
        for name in train.trackers:
            identifier = known.ids.get(name) or secrets.token_hex(4)
            setup = Setup(
                folder,
                train.project,
                run_name(config),
                identifier,
                name in known.ids,
                done,
                config.model_dump(mode="json"),
            )
            begun = partial(known.add, name, setup.id)
            kept = given if setup.known and name not in _DRAW_OVER else {}
            self._feeds.append(Feed(name, setup, given=kept, begun=begun))

    def log(self, kind: str, record: dict[str, Any]) -> None:
        """kind: train or eval. record: of a jsonl file; only its numbers are sent."""
        metrics = {
            f"{kind}/{key}": float(value)
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for feed in self._feeds:
            feed.put(kind, record["step"], metrics)

    def close(self, *, finished: bool, failed: bool) -> None:
        for feed in self._feeds:
            feed.end(failed=failed)
        until = time.monotonic() + (PATIENCE_S if finished else HURRY_S)
        for feed in self._feeds:
            feed.wait(until)


def run_name(config: Config) -> str:
    """train.run_name, or what tells the run's folder from others."""
    return config.train.run_name or "/".join(Path(config.train.out_dir).parts[-2:])


class Known:
    """trackers.json: the names of this run in the trackers that have started."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self.ids: dict[str, str] = {}
        with contextlib.suppress(OSError, StoreError):  # none yet; or damaged: new curves begin
            kept = read_json(file)
            self.ids = {name: kept[name] for name in TRACKERS if name in kept}

    def add(self, name: str, identifier: str) -> None:
        with self._lock:
            if name not in self.ids:
                self.ids = self.ids | {name: identifier}
                temporary = self._file.with_name(".trackers.json")
                put_file(LOCAL, self._file, encode_json(self.ids), temporary=temporary)


def _as_markdown(settings: dict[str, Any]) -> str:
    import yaml

    text = yaml.safe_dump(settings, sort_keys=False)
    return "".join(f"    {line}\n" for line in text.splitlines())


def _shown(error: BaseException) -> str:
    """Returns the error's class, and the first line of its message if it has one."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
