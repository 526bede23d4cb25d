"""Whether the corpus is there, and room for what is to be written, in folders free for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megadistill.blocks.layout import KINDS, kind_of
from megadistill.config import Config, DataConfig
from megadistill.config.rules import NO_CORPUS
from megadistill.errors import ConfigError
from megadistill.preflight.plan import Plan
from megadistill.storage.disk import LESS, check_disk, device_of, is_url

_FEWER = "keep fewer checkpoints (train.keep)"
_RUN_ENTRIES = {"run.json", ".run.json", "metrics.jsonl", "checkpoints", "model"}


def check_corpus(data: DataConfig) -> None:
    """A corpus is named; local files are there, not empty, and of a kind that can be read."""
    if not (data.source or data.files or data.name):
        raise ConfigError(f"data: {NO_CORPUS}")
    if data.files is not None:
        from megadistill.data.sources import text_files

        text_files.kind(text_files.find(data.files))


def check_apart(training: list[str], held_out: list[str]) -> None:
    """No file is trained on and held out, under another name, through a link, or as a copy.

    Only files of equal size are read, at most 64 MiB of each.
    """
    from megadistill.data.sources import text_files

    by_size: dict[int, list[str]] = {}
    for path in text_files.find(training):
        by_size.setdefault(os.path.getsize(path), []).append(path)
    shared = []
    for path in text_files.find(held_out):
        for other in by_size.get(os.path.getsize(path), []):
            if os.path.samefile(path, other) or text_files.fingerprint(
                path
            ) == text_files.fingerprint(other):
                shared.append((path, other))
                break
    if shared:
        path, other = shared[0]
        what = "" if path == other else f", as {other}"
        raise ConfigError(
            f"eval.files: {path} is among the text that is trained on (data.files{what}), "
            f"{len(shared)} such file(s): hold out other files"
        )


def check_store_folder(path: str, key: str, kind: str) -> None:
    """A store of `kind` can be made, or gone on with, at `path`."""
    if is_url(path):
        raise ConfigError(
            f"{key}: a URL cannot be written in place: set it to a folder, and copy what is made "
            "with tools/copy_cache.py"
        )
    folder = Path(path)
    _can_be_written(folder, key)
    if not folder.is_dir():
        return
    found = kind_of(folder)
    others = _entries(folder, besides={"ids.bin", "blocks"})
    if found not in (None, kind):
        raise ConfigError(f"{key}: {path} holds a store of kind {found}: choose another folder")
    if found is None and others:
        raise ConfigError(
            f"{key}: {path} holds something else ({_some(others)}) and no {KINDS[kind]}: choose "
            "an empty folder, or one that is not there yet"
        )


def check_run_folder(out_dir: str) -> None:
    """A training run can be made, or gone on with, in train.out_dir."""
    if is_url(out_dir):
        raise ConfigError("train.out_dir: a URL cannot be trained into: set it to a folder")
    folder = Path(out_dir)
    _can_be_written(folder, "train.out_dir")
    others = _entries(folder) if folder.is_dir() else []
    # A run that was killed before it wrote run.json leaves its lock.
    others = [name for name in others if not name.startswith("run.lock")]
    if others and not _RUN_ENTRIES.intersection(others):
        raise ConfigError(
            f"train.out_dir: {folder} holds something else ({_some(others)}) and no training run: "
            "choose an empty folder, or one that is not there yet"
        )


def check_cache_is_there(
    path: str, *, key: str, way_out: str, text_is_enough: bool = False
) -> None:
    """Checks for a cache at `path`, complete or not; with `text_is_enough` a token store serves."""
    if is_url(path):
        return  # the network is for the start, where it is asked once and for good
    there = Path(path).is_dir()
    found = kind_of(Path(path)) if there else None
    if found != "cache" and not (found == "tokens" and text_is_enough):
        what = f"holds no {KINDS['cache']}" if there else "does not exist"
        raise ConfigError(f"{key}: {path} {what}, expected a cache: {way_out}")


def _entries(folder: Path, *, besides: set[str] | None = None) -> list[str]:
    return sorted(set(os.listdir(folder)) - (besides or set()))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if names[2:] else ""
    return ", ".join(names[:2]) + more


def _can_be_written(folder: Path, key: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{key}: {folder} is a file, expected a folder: choose another place")
    dangling = next(
        (p for p in (folder, *folder.parents) if p.is_symlink() and not p.exists()), None
    )
    if dangling is not None:
        raise ConfigError(
            f"{key}: {dangling} is a link to {os.readlink(dangling)}, which does not exist: make "
            "that folder, or choose another place"
        )
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{key}: {folder} would lie in {nearest}, which is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {nearest} cannot be written to: choose another folder")


def check_room(config: Config, plan: Plan, *, training: bool) -> None:
    """The disks have room for what is estimated to be still to come.

    An estimate may err: with cache.reserve=0 generating is held to cache.min_free alone.
    """
    trusting = config.cache.reserve == 0 and not training
    for key, path, needed in _needs(config, plan, training=training):
        if needed is not None:
            needed = 0 if trusting else needed
            reserve = int(config.cache.min_free * 2**30)
            less = _FEWER if key == "train.out_dir" else LESS
            check_disk(path, needed, key=key, reserve=reserve, less=less)


def _needs(config: Config, plan: Plan, *, training: bool) -> Iterator[tuple[str, str, int | None]]:
    """(key, folder, bytes still to come) for each disk, stores on one disk added up."""
    if training:
        yield "train.out_dir", config.train.out_dir, plan.run_bytes_to_come
        if config.teacher.mode == "online":
            yield "data.dir", config.data.dir, plan.token_bytes_to_come
        return
    first, second = plan.token_bytes_to_come, plan.cache_bytes_to_come
    one_disk = device_of(config.data.dir) == device_of(config.cache.folder)
    if one_disk and first is not None and second is not None:
        yield "cache.dir", config.cache.folder, first + second
        return
    yield "data.dir", config.data.dir, first
    yield "cache.dir", config.cache.folder, second
