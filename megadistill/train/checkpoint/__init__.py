"""Checkpoints: DeepSpeed's own files, and a manifest of ours that makes them believable.

    checkpoints/step-000200/
      zero_pp_rank_..., ...        DeepSpeed's: weights, fp32 copies, moments, one file a rank
      random-00000.pt              each rank's random states
      ema-00000.pt                 each rank's part of the moving average, with train.ema
      manifest.json                written last: size and xxh3 of every file, where the run stood

DeepSpeed writes in place, without checks, and loads with pickle. So it writes into a temporary
folder. All files are fsynced, then the manifest is written, and the folder is renamed. Before a
checkpoint is removed it is renamed again. A checkpoint without a manifest, or with a file that
differs from it, is skipped with a warning, and the one before is used. A run that died in its first
save has none, so it starts again. Rank 0 chooses the checkpoint for all ranks. Another number of
ranks loads through universal.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from megadistill.errors import CorruptBlockError, StoreError, TrainError
from megadistill.storage.files import LOCAL
from megadistill.storage.records import encode_json, hex64, put_file, read_json
from megadistill.train.checkpoint.universal import FOLDER, load_universal

if TYPE_CHECKING:
    from megadistill.train.student_engine import Trainer

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_SAVING, _REMOVING = ".saving", ".removing"


@dataclass(frozen=True)
class Position:
    """Position of a run: everything to resume except weights, moments and random states."""

    step: int
    sequences: int
    tokens: int
    skipped: int = 0  # steps left out for numbers that are not finite


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    position: Position
    world: int  # ranks that wrote it
    metrics: dict[str, float] | None  # of the held-out evaluation of its step


def save(
    trainer: Trainer,
    folder: Path,
    position: Position,
    *,
    keep: int,
    keep_best: bool = False,
    metrics: dict[str, float] | None = None,
    guard: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `folder`/step-NNNNNN, then removes all but the newest `keep`. Collective.

    A trainer with a background writer first waits for the save before.

    metrics: of the held-out evaluation of this step. keep_best: also keep the checkpoint of the
    lowest held-out loss. guard: called on rank 0 before the first file is written and before
    the checkpoint gets its name; raises if the folder belongs to another run.
    """
    mesh, background = trainer.mesh, trainer.background
    write: Callable[[Any, Path], None] = torch.save
    if background is not None:
        background.wait()
        write = background.put
    path, target = folder / _SAVING, folder / f"step-{position.step:06d}"

    def clear() -> None:
        guard()
        # What a killed save left there would otherwise be listed as part of this one.
        LOCAL.remove_tree(path)

    mesh.run_on_rank0(clear)
    trainer.engine.save_checkpoint(str(folder), tag=path.name, save_latest=False)
    write(_random_states(), path / f"random-{mesh.rank:05d}.pt")
    if trainer.ema is not None:
        trainer.ema.save(path, rank=mesh.rank, write=write)
    mesh.barrier()

    def seal() -> None:
        _seal(path, position, mesh.world, metrics)
        guard()
        _remove(target)  # a damaged one, that was passed over
        LOCAL.replace(path, target)
        LOCAL.fsync_dir(folder)
        _remove_all_but(folder, keep=keep, keep_best=keep_best)

    if background is not None:
        background.start(seal)
    else:
        mesh.run_on_rank0(seal)
    return target


def latest(folder: Path) -> Checkpoint | None:
    """Returns the newest sound checkpoint, every byte verified. Rank 0 only.

    Raises TrainError if there are checkpoints and none is sound.
    """
    for name in (_SAVING, _REMOVING, FOLDER):  # of a run that died meanwhile
        LOCAL.remove_tree(folder / name)
    return newest_sound(folder)


def newest_sound(folder: Path) -> Checkpoint | None:
    """As `latest`, and leaves the folder as it is."""
    found = sorted(checkpoints(folder), reverse=True)
    for step, path in found:
        try:
            return verified(path)
        except (CorruptBlockError, StoreError, TrainError) as error:
            log.warning("checkpoint of step %d is passed over: %s", step, error)
    if found:
        raise TrainError(
            f"{folder}: none of its {len(found)} checkpoint(s) is sound: restore one from a "
            "backup, or choose another train.out_dir to start again"
        )
    return None


def best(folder: Path) -> Checkpoint | None:
    """Returns the checkpoint of the lowest held-out loss, None without a sound one. Rank 0 only.

    A damaged one is logged. No other replaces it, because its loss would be another.
    """
    ranked = sorted(_losses(folder).items(), key=lambda item: (item[1], item[0]))
    if not ranked:
        return None
    try:
        return verified(ranked[0][0])
    except (CorruptBlockError, StoreError, TrainError) as error:
        log.warning("the best checkpoint is passed over: %s", error)
        return None


def lowest_loss(folder: Path) -> float:
    """Returns the lowest held-out loss of all checkpoints; infinity without one. Rank 0 only."""
    return min(_losses(folder).values(), default=math.inf)


def load(trainer: Trainer, found: Checkpoint) -> None:
    """Loads weights, moments, averages, counters and, at the same rank count, random states.

    Collective.
    """
    engine, mesh = trainer.engine, trainer.mesh
    if trainer.ema is not None:
        trainer.ema.load(found.path, rank=mesh.rank, written_by=found.world)
    if found.world != mesh.world:
        # Nothing but dropout draws from the states, and it promises nothing here.
        load_universal(engine, mesh, found.path, written_by=found.world)
        return
    loaded, _ = engine.load_checkpoint(str(found.path.parent), tag=found.path.name)
    if loaded is None:
        raise TrainError(
            f"{found.path}: DeepSpeed cannot load it, although every file is as written"
        )
    states = torch.load(found.path / f"random-{mesh.rank:05d}.pt", weights_only=True)
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    mesh.barrier()


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Returns (step, folder) of every folder named like a checkpoint, sound or not."""
    if not folder.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [(int(match[1]), path) for match, path in named if match]


def verified(path: Path) -> Checkpoint:
    """Returns a checkpoint after verifying every file.

    Raises TrainError where there is no manifest or a file differs, CorruptBlockError for a damaged
    manifest.
    """
    try:
        manifest = read_json(path / MANIFEST)
    except FileNotFoundError:
        raise TrainError(f"{path}: has no {MANIFEST}: it was removed") from None
    for name, expected in manifest["files"].items():
        file = path / name
        found = _entry(file) if file.is_file() else "no such file"
        if found != expected:
            raise TrainError(f"{file}: expected {expected}, found {found}: the file is damaged")
    return Checkpoint(
        path, Position(**manifest["position"]), manifest["world"], manifest.get("figures")
    )


def _seal(path: Path, position: Position, world: int, metrics: dict[str, float] | None) -> None:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        LOCAL.fsync(file)
    for directory in sorted({file.parent for file in files} | {path, path.parent}):
        LOCAL.fsync_dir(directory)
    finite = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}
    manifest = {
        "figures": finite or None,
        "files": {file.relative_to(path).as_posix(): _entry(file) for file in files},
        "format_version": 1,
        "position": vars(position),
        "world": world,
    }
    put_file(LOCAL, path / MANIFEST, encode_json(manifest), temporary=path / f".{MANIFEST}")


def _remove_all_but(folder: Path, *, keep: int, keep_best: bool) -> None:
    kept = [path for _, path in sorted(checkpoints(folder))[-keep:]]
    losses = _losses(folder) if keep_best else {}
    if losses:
        kept.append(min(losses, key=lambda path: (losses[path], path)))
    for _, path in checkpoints(folder):
        if path not in kept:
            _remove(path)


def _losses(folder: Path) -> dict[Path, float]:
    """Returns the held-out loss of every checkpoint whose readable manifest has one."""
    losses = {}
    for _, path in checkpoints(folder):
        with contextlib.suppress(FileNotFoundError, CorruptBlockError, StoreError):
            metrics = read_json(path / MANIFEST).get("figures") or {}
            if "loss" in metrics:
                losses[path] = float(metrics["loss"])
    return losses


def _remove(path: Path) -> None:
    if path.is_dir():
        LOCAL.remove_tree(path.parent / _REMOVING)
        LOCAL.replace(path, path.parent / _REMOVING)
        LOCAL.remove_tree(path.parent / _REMOVING)


def _entry(file: Path) -> dict[str, Any]:
    state, size = xxhash.xxh3_64(), 0
    with file.open("rb") as opened:
        while chunk := opened.read(16 << 20):
            state.update(chunk)
            size += len(chunk)
    return {"size": size, "xxh3": hex64(state.intdigest())}


def _random_states() -> dict[str, Any]:
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    with contextlib.suppress(RuntimeError, AssertionError):
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
    return states
