"""The folder train.out_dir: which run it holds, and whether this run may resume it.

run.lock        the process that writes; exists while a run lives
run.json        what the run is, written first
trackers.json   with train.trackers, the names of the run there
metrics.jsonl   a line per step
eval.jsonl      a line per evaluation
checkpoints/    of which the newest sound one is resumed
model_best/     with train.keep_best, the model of the lowest held-out loss
model/          the trained model; put in place last, so that it says the run is finished

One process group writes at a time: rank 0 holds the lock from before `claim` until the export, and
compares its token before every save and every line of metrics.

run.json is replaced in two cases only, both under the lock. A run without a checkpoint has nothing
to resume, so its folder begins anew with any settings. And train.steps may grow where no step that
is done depends on it (`more_steps.py`).
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.blocks.recipe import differences, require_same_recipe, shown_differences
from megadistill.config import Config
from megadistill.errors import CorruptBlockError, RecipeError, TrainError
from megadistill.storage.files import LOCAL
from megadistill.storage.lock import RUN_LOCK, StoreLock, require_holder
from megadistill.storage.records import encode_json, put_file, read_json
from megadistill.train import checkpoint
from megadistill.train.checkpoint import Checkpoint
from megadistill.train.more_steps import STEPS, reason_against_growth
from megadistill.train.reporting.jsonl_log import JOURNALS, read_records
from megadistill.train.run_keys import run_keys, without_followers
from megadistill.train.training_source import TrainingSource

log = logging.getLogger(__name__)

_PATIENCE_S = 60.0  # without a heartbeat, until a holder on another host counts as dead

# Where and how often something is written, and how a step is cut up, are no part of what is run.
_FREE = (
    "out_dir",
    "save_every",
    "save_minutes",
    "eval_every",
    "keep",
    "keep_best",
    "micro_batch",
    "use_ema",
    "non_finite",
    "skip_budget",
    "activation_checkpointing",
    "save_in_background",
    "trackers",
    "project",
    "run_name",
)
# Without an average nothing is said of it, as before there was one.
_EMA = ("ema", "ema_decay")


@dataclass(frozen=True)
class Claimed:
    """Holds what a run found in its folder."""

    finished: bool
    found: Checkpoint | None  # where it resumes


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints, self.model = self.path / "checkpoints", self.path / "model"
        self.best = self.path / "model_best"
        self._identity = self.path / "run.json"
        self._lock: StoreLock | None = None

    def claim(self, identity: dict[str, Any], config: Config, held: ExitStack) -> Claimed:
        """Claims the folder for this run, or checks that it is this run's. Rank 0 only.

        held: holds the folder's lock from now on; a finished run is found without taking it.
        Raises LockedError while another process trains here, TrainError for a folder with other
        content or a damaged jsonl file, RecipeError, naming the key, for a run of another
        configuration.
        """
        self._refuse_anything_else()
        if self._is(identity) and self.exported:
            self._check_journals()
            return Claimed(True, None)
        LOCAL.mkdir(self.path)
        self._lock = self._new_lock()
        held.enter_context(self._lock)
        self._refuse_anything_else()
        begun = self._identity.exists()
        self._check_journals()
        if begun and (checkpoint.checkpoints(self.checkpoints) or self.exported):
            self._refuse_another_run(identity, config)  # before gigabytes are read
        found = checkpoint.latest(self.checkpoints)
        if not begun:
            self._write(identity)
        elif found is None and not self.exported:
            self._begin_anew(identity)
        else:
            self._settle(identity, config, found)
        return Claimed(self.exported, found)

    def check(self, identity: dict[str, Any] | None, config: Config) -> None:
        """Refuses what `claim` refuses, as far as that is known without the folder's lock.

        identity: None where it is not known yet. Takes no lock and writes nothing; reads the newest
        checkpoint. For a dry run.
        """
        self._refuse_anything_else()
        self._check_journals()
        begun = self._identity.exists() and identity is not None
        if begun and self._is(identity or {}) and self.exported:
            return
        self._new_lock().require_free()
        if identity is None or not begun:
            return
        if checkpoint.checkpoints(self.checkpoints) or self.exported:
            self._refuse_another_run(identity, config)
            found = checkpoint.newest_sound(self.checkpoints)
            self._require_resumable(identity, config, found)

    def _new_lock(self) -> StoreLock:
        what = f"train.out_dir: {self.path}"
        return StoreLock(self.path / RUN_LOCK, what=what, patience_s=_PATIENCE_S)

    @property
    def exported(self) -> bool:
        """Whether the trained model exists; an empty folder does not count."""
        return (self.model / "config.json").is_file()

    def require_lock(self) -> None:
        """Raises LockedError if another process has taken over the folder. Rank 0 only."""
        if self._lock is not None:
            require_holder(self._lock.path, self._lock.token, what=self._lock.what)

    def is_ours(self) -> bool:
        """Whether `require_lock` would pass; True on ranks that hold no lock."""
        return self._lock is None or self._lock.held()

    def _refuse_anything_else(self) -> None:
        if self._identity.exists() or not self.path.exists():
            return
        # Left by a run that died before run.json was in place.
        if any(
            p.name != ".run.json" and not p.name.startswith(RUN_LOCK) for p in self.path.iterdir()
        ):
            raise TrainError(
                f"train.out_dir: {self.path} holds files, but no run of megadistill (there is "
                f"no {self._identity.name}): choose another folder, or empty it"
            )

    def _check_journals(self) -> None:
        for journal in JOURNALS:
            read_records(self.path / journal)

    def _is(self, identity: dict[str, Any]) -> bool:
        return self._identity.exists() and not self._differences(identity)

    def _differences(self, identity: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        return list(differences(self._begun(), identity))

    def _begun(self) -> dict[str, Any]:
        """Returns run.json. Raises TrainError if it is damaged."""
        try:
            return read_json(self._identity)
        except CorruptBlockError as error:
            raise TrainError(
                f"{self._identity}: is damaged, so the run cannot be identified: expected "
                f"{error.expected}, found {error.found}: restore it from a copy, or choose "
                "another train.out_dir"
            ) from error

    def _write(self, identity: dict[str, Any]) -> None:
        temporary = self.path / ".run.json"
        LOCAL.unlink(temporary)  # of a run that died writing it
        put_file(LOCAL, self._identity, encode_json(identity), temporary=temporary)

    def _begin_anew(self, identity: dict[str, Any]) -> None:
        """Begins anew over a run without a checkpoint, of which nothing can be resumed."""
        done = max((r["step"] for r in read_records(self.path / JOURNALS[0])), default=0)
        lost = f", and the {done} step(s) it did are lost" if done else ""
        log.warning(
            "%s: the run that was begun here left no checkpoint%s: this one begins at step 1",
            self.path,
            lost,
        )
        different = self._differences(identity)
        if different:
            log.warning(
                "%s: other settings than before: %s", self.path, shown_differences(different)
            )
            LOCAL.unlink(self.path / "trackers.json")  # another run, so another curve
            self._write(identity)

    def _settle(self, identity: dict[str, Any], config: Config, found: Checkpoint | None) -> None:
        """Checks that the run in the folder may be resumed: it has these settings, or may grow."""
        grown = self._require_resumable(identity, config, found)
        if grown is not None:
            self._grow(identity, *grown)

    def _require_resumable(
        self, identity: dict[str, Any], config: Config, found: Checkpoint | None
    ) -> tuple[int, int] | None:
        """(steps before, steps now) of a run that grows, else None; RecipeError for another run."""
        different = self._differences(identity)
        if found is not None and STEPS in {name for name, _, _ in different}:
            old, new = (each["train"]["steps"] for each in (self._begun(), identity))
            others = [name for name, _, _ in different if name != STEPS]
            reason = reason_against_growth(
                config, others, old=old, new=new, done=found.position.step
            )
            if reason is None and not others:
                return old, new
            if reason is not None:
                raise RecipeError(
                    f"{self._identity}: {STEPS} is {old}, this run's is {new}: {reason}: set "
                    f"{STEPS}={old}, or choose another train.out_dir"
                )
        self._refuse_another_run(identity, config, but_for=())
        return None

    def _refuse_another_run(
        self, identity: dict[str, Any], config: Config, *, but_for: tuple[str, ...] = (STEPS,)
    ) -> None:
        """Raises RecipeError if the run has other settings, those in `but_for` excepted."""
        if {name for name, _, _ in self._differences(identity)}.isdisjoint(but_for):
            begun = self._begun()
            require_same_recipe(
                without_followers(begun, identity),
                without_followers(identity, begun),
                file=str(self._identity),
                other="this run's is",
                keys=run_keys(config),
            )

    def _grow(self, identity: dict[str, Any], old: int, new: int) -> None:
        log.info("%s: train.steps grows from %d to %d", self.path, old, new)
        if self.exported:
            # Moved first: with the new run.json it would say that the longer run is finished.
            kept = self.path / f"model_step_{old:06d}"
            LOCAL.remove_tree(kept)
            LOCAL.replace(self.model, kept)
            LOCAL.fsync_dir(self.path)
            log.info("%s: the model of step %d", kept, old)
        self._write(identity)

    def blocks(self) -> list[tuple[int, ...] | None] | None:
        """Returns the blocks of each store that the run was begun on, None for a complete store.

        None where no run has begun here.
        """
        if not self._identity.exists():
            return None
        stores = self._begun()["cache"]
        return [_numbers(stores[str(i)].get("blocks")) for i in range(len(stores))]


def _without_empty(section: dict[str, Any], *names: str) -> dict[str, Any]:
    """Without these mappings where they are empty: runs begun before the keys were there resume."""
    return {key: value for key, value in section.items() if value or key not in names}


def run_identity(config: Config, stores: list[TrainingSource], steps: int) -> dict[str, Any]:
    """Returns every setting that the trained weights depend on."""
    assert config.student is not None
    free = {*_FREE, "steps", "epochs", *(() if config.train.ema else _EMA)}
    train = _without_empty(config.train.model_dump(mode="json", exclude=free), "optimizer_options")
    if config.train.optimizer == "adamw":  # the only one of runs begun before there were others
        del train["optimizer"]
    return {
        "cache": {
            str(i): {"recipe": s.recipe, "sequences": len(s), "weight": s.weight}
            | ({} if s.blocks is None else {"blocks": _ranges(s.blocks)})
            | _ensemble(s)
            for i, s in enumerate(stores)
        },
        "data": {"pack": config.data.pack},
        "deepspeed": config.deepspeed,
        "features": config.features.model_dump(mode="json"),
        "format_version": 1,
        "loss": _without_empty(config.loss.model_dump(mode="json"), "options"),
        "order": config.order.model_dump(mode="json"),
        "student": config.student.model_dump(mode="json"),
        "train": {**train, "steps": steps},
    }


def _ensemble(store: TrainingSource) -> dict[str, Any]:
    """Returns the recipes and weights of the other teachers; empty where there are none."""
    other_teachers = {
        str(i): {"recipe": other.recipe, "weight": other.teacher_weight}
        for i, other in enumerate(store.other_teachers)
    }
    return {"ensemble": other_teachers} if other_teachers else {}


def _ranges(blocks: tuple[int, ...]) -> str:
    """Returns blocks as text: 0 to 5 and 8 are "0-5,8"."""
    ends = [i for i, b in enumerate(blocks) if i + 1 == len(blocks) or blocks[i + 1] != b + 1]
    starts = [0, *(i + 1 for i in ends[:-1])]
    return ",".join(
        f"{blocks[a]}" if a == b else f"{blocks[a]}-{blocks[b]}"
        for a, b in zip(starts, ends, strict=True)
    )


def _numbers(ranges: str | None) -> tuple[int, ...] | None:
    if ranges is None:
        return None
    pairs = (part.partition("-")[::2] for part in ranges.split(","))
    return tuple(b for first, last in pairs for b in range(int(first), int(last or first) + 1))
