"""Datasets by name, on the hub or in a folder, through `datasets`."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megadistill.config import DataConfig
from megadistill.data.sources import arrow_rows, text_files
from megadistill.data.sources.compressed import reason, shown
from megadistill.data.sources.row import Row
from megadistill.errors import DataError

_OURS = ("json", "parquet", "arrow")
_PATTERN = re.compile(r"[*?\[\]:#%]")
_links: list[tempfile.TemporaryDirectory] = []


def identity(config: DataConfig) -> dict[str, Any]:
    """The dataset in the recipe, by content or revision."""
    part = {"config": config.config, "split": config.split}
    if _is_folder(config):
        paths = sorted(str(p) for p in Path(_name(config)).rglob("*") if p.is_file())
        return {"source": "folder", "content": text_files.content_identity(paths), **part}
    return {"source": _name(config), "revision": _revision(config), **part}


def folder_files(config: DataConfig) -> tuple[str, list[str]] | None:
    """(kind, files) of a split in a local folder; None where `datasets` has to read it."""
    if not _is_folder(config):
        return None
    with _errors(config):
        base = _path(config)
        builder = _datasets().load_dataset_builder(base, config.config)
    found = (builder.config.data_files or {}).get(config.split)
    folder = os.path.abspath(_name(config))
    # The files themselves, not through the link.
    paths = [str(path) for path in found or []]
    paths = [folder + p.removeprefix(base) if p.startswith(base) else p for p in paths]
    if not paths or not all(Path(path).is_file() for path in paths):
        return None
    with contextlib.suppress(DataError):
        kind = text_files.kind(paths)
        return (kind, paths) if kind in _OURS else None
    return None


def load(config: DataConfig, fields: list[str]) -> Any:
    """The split of a dataset: a Dataset, or with `data.streaming` an IterableDataset."""
    with _errors(config):
        return _datasets().load_dataset(
            _path(config),
            config.config,
            split=config.split,
            streaming=config.streaming,
            revision=None if _is_folder(config) else _revision(config),
        )


def columns(config: DataConfig) -> list[str]:
    """The columns of a dataset."""
    return column_names(load(config, []), config)


def column_names(dataset: Any, config: DataConfig) -> list[str]:
    """The columns of a dataset; of a stream that does not say, by its first rows."""
    with _errors(config):
        names = dataset.column_names
        if names is None:
            first = next(dataset.with_format("arrow").iter(arrow_rows.BATCH), None)
            names = [] if first is None else first.column_names
        return list(names)


def rows(dataset: Any, config: DataConfig, fields: list[str], start: int) -> Iterator[Row]:
    """The rows of a stream from number `start` on."""
    return _rows(dataset.with_format("arrow").skip(start), config, fields, start)


def rows_of_all(
    dataset: Any, config: DataConfig, fields: list[str], start: int, order: np.ndarray | None
) -> Iterator[Row]:
    """The rows of a dataset on disk, of which any can be reached, in `order`."""
    if start >= len(dataset):
        return iter(())
    order = np.arange(len(dataset)) if order is None else order
    return _rows(dataset.select(order[start:]).with_format("arrow"), config, fields, start)


def copied(generate: Callable[..., Iterator[dict]], arguments: dict[str, Any]) -> Any:
    """The rows that `generate(**arguments)` yields, as a Dataset in the cache of `datasets`."""
    datasets = _datasets()
    try:
        return datasets.Dataset.from_generator(
            generate,
            gen_kwargs=arguments,
            features=datasets.Features(row=datasets.Value("large_string")),
        )
    except datasets.exceptions.DatasetsError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise DataError(f"the corpus cannot be copied to be shuffled: {reason(error)}") from error


def shown_name(config: DataConfig) -> str:
    """The name of the dataset, and of its configuration, for messages."""
    name = shown(_name(config))
    return name if config.config is None else f"{name} ({config.config})"


def _rows(dataset: Any, config: DataConfig, fields: list[str], start: int) -> Iterator[Row]:
    number, where = start, shown_name(config)
    with _errors(config):
        for table in dataset.iter(arrow_rows.BATCH):
            for row in arrow_rows.rows(table, fields, number):
                yield row._replace(place=f"{where}: {row.place}")
            number += table.num_rows


def _datasets() -> Any:
    import datasets

    # Its bars would be mixed with ours, and a row count is no measure of the work.
    datasets.disable_progress_bars()
    return datasets


@contextlib.contextmanager
def _errors(config: DataConfig) -> Iterator[None]:
    import pyarrow

    exceptions = _datasets().exceptions.DatasetsError
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException, exceptions) as error:
        cause = error.__cause__ or error
        raise DataError(f"{shown_name(config)}: cannot be read: {reason(cause)}") from error


def _name(config: DataConfig) -> str:
    assert config.name is not None
    return config.name


def _path(config: DataConfig) -> str:
    """The name for `datasets`, which reads `[`, `*` and the like in a folder's name as a pattern.

    Such a folder is given by a folder of links to its files, which stays until the program ends: a
    stream opens its files late.
    """
    name = _name(config)
    if not _is_folder(config) or not _PATTERN.search(os.path.abspath(name)):
        return name
    _links.append(tempfile.TemporaryDirectory())
    base, folder = Path(_links[-1].name).resolve(), Path(os.path.abspath(name))
    for file in filter(Path.is_file, folder.rglob("*")):
        link = base / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return str(base)


def _is_folder(config: DataConfig) -> bool:
    return Path(_name(config)).is_dir()


def _revision(config: DataConfig) -> str:
    """The commit of the hub dataset.

    What a branch's name points to changes, so recipe and reading are bound to the commit.
    """
    if config.revision is not None and re.fullmatch(r"[0-9a-f]{40}", config.revision):
        return config.revision
    import huggingface_hub

    name = _name(config)
    try:
        revision = huggingface_hub.HfApi().dataset_info(name, revision=config.revision).sha
        assert revision is not None
        return revision
    except Exception as error:  # offline, refused, unknown: each client has errors of its own
        constants = huggingface_hub.constants
        folder = constants.REPO_ID_SEPARATOR.join(["datasets", *name.split("/")])
        noted = Path(constants.HF_HUB_CACHE, folder, "refs", config.revision or "main")
        if noted.is_file():
            return noted.read_text().strip()  # the commit that was downloaded last
        raise DataError(
            f"data.name: {name} cannot be found on the hub ({reason(error)}): check the name, the "
            "connection and HF_TOKEN, or set data.files to local files"
        ) from error
