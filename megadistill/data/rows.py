"""Corpora made of rows, through `datasets`: a name on the hub, local parquet, json, arrow files.

Rows are read as Arrow tables and only the columns that are asked for become Python objects: a
resumed run passes over millions of rows in seconds. Local files are streamed too unless they are
shuffled, since `datasets` would first copy them into its cache.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadistill.config import DataConfig
from megadistill.data import files
from megadistill.data.document import Document
from megadistill.data.hashing import permutation
from megadistill.errors import DataError

log = logging.getLogger(__name__)

_ROWS = 64  # rows a table: their text may be large, so few
# A stream cannot be shuffled whole: it is shuffled within windows of so many documents. Windows
# rather than a rolling buffer, so that reading can start at any document.
WINDOW = 1000
_SHUFFLE_ALL, _SHUFFLE_WINDOW = 5, 6  # purposes of the permutations


def read(config: DataConfig, start: int) -> Iterator[Document]:
    """The documents from number `start` on.

    Raises DataError before the first one where there is no such corpus or column.
    """
    import datasets

    try:
        dataset = _load(config)
        if isinstance(dataset, datasets.Dataset):
            tables = _tables_of_all(dataset, config, start)
        elif config.shuffle:
            tables = _tables_by_window(dataset, config, start)
        else:
            tables = dataset.with_format("arrow").skip(start).iter(_ROWS)
        number = start
        for table in tables:
            for values in zip(*(_column(table, c, config) for c in _fields(config)), strict=True):
                yield _document(config, number, values)
                number += 1
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"{_where(config)}: cannot be read: {lines[0]}") from error


def identity(config: DataConfig) -> dict[str, Any]:
    """What the corpus is, for the recipe."""
    fields: dict[str, Any] = {"fields": _fields(config)}
    if config.shuffle:
        window = WINDOW if config.streaming else None
        fields["shuffle"] = {"seed": config.seed, "window": window}
    if config.files is not None:
        paths = files.find(config.files)
        return {"source": files.kind(paths), "content": files.content_identity(paths), **fields}
    fields |= {"config": config.config, "split": config.split}
    if _is_folder(config):
        paths = sorted(str(p) for p in Path(_name(config)).rglob("*") if p.is_file())
        return {"source": "folder", "content": files.content_identity(paths), **fields}
    return {"source": _name(config), "revision": _revision(config), **fields}


def count(config: DataConfig) -> None:
    """How many documents there are is not known without reading."""


def _load(config: DataConfig) -> Any:
    import datasets

    # Its bars would be mixed with ours, and a row count is no measure of the work.
    datasets.disable_progress_bars()
    streaming = config.streaming or (config.files is not None and not config.shuffle)
    if config.files is not None:
        paths = files.find(config.files)
        return datasets.load_dataset(
            files.kind(paths), data_files={"train": paths}, split="train", streaming=streaming
        )
    return datasets.load_dataset(
        _name(config), config.config, split=config.split, streaming=streaming,
        revision=None if _is_folder(config) else _revision(config),
    )  # fmt: skip


def _tables_of_all(dataset: Any, config: DataConfig, start: int) -> Iterator[Any]:
    """A whole dataset on disk: any row can be reached."""
    if start >= len(dataset):
        return iter(())
    if config.shuffle:
        order = permutation(len(dataset), config.seed, _SHUFFLE_ALL)
        log.info("%s: %d documents shuffled, seed %d", _where(config), len(order), config.seed)
        dataset = dataset.select(order[start:])
    else:
        dataset = dataset.select(range(start, len(dataset)))
    return dataset.with_format("arrow").iter(_ROWS)


def _tables_by_window(dataset: Any, config: DataConfig, start: int) -> Iterator[Any]:
    """A stream, shuffled within windows."""
    log.info(
        "%s: documents shuffled in windows of %d, seed %d", _where(config), WINDOW, config.seed
    )
    window, passed = divmod(start, WINDOW)
    stream = dataset.with_format("arrow").skip(window * WINDOW)
    for table in stream.iter(WINDOW):
        order = permutation(len(table), config.seed, _SHUFFLE_WINDOW, window)[passed:]
        for at in range(0, len(order), _ROWS):
            yield table.take(order[at : at + _ROWS])
        window, passed = window + 1, 0


def _fields(config: DataConfig) -> list[str]:
    if config.messages_field is not None:
        return [config.messages_field]
    if config.prompt_field is not None and config.completion_field is not None:
        return [config.prompt_field, config.completion_field]
    return [config.text_field]


def _column(table: Any, name: str, config: DataConfig) -> list[Any]:
    if name not in table.column_names:
        keys = ("messages_field", "prompt_field", "completion_field", "text_field")
        key = next(k for k in keys if getattr(config, k) == name)
        raise DataError(
            f"data.{key}: {_where(config)} has no column {name!r}; its columns are "
            f"{', '.join(table.column_names)}: set data.{key} to one of them"
        )
    return _decoded(table.select([name]))


def _decoded(table: Any) -> list[Any]:
    """The only column of `table` as `datasets` gives it in Python format."""
    import datasets
    import pyarrow

    values = table.column(0).to_pylist()
    if pyarrow.types.is_string(table.schema.types[0]):
        return values
    features = datasets.Features.from_arrow_schema(table.schema)
    return features.decode_batch({table.column_names[0]: values})[table.column_names[0]]


def _document(config: DataConfig, number: int, values: tuple[Any, ...]) -> Document:
    place = f"{_where(config)}: document {number}"
    if config.messages_field is not None:
        return Document(messages=_chat(config, number, values[0]), place=place)
    for field, value in zip(_fields(config), values, strict=True):
        if not isinstance(value, str | None):
            found = type(value).__name__
            problem = f"expected text in column {field!r}, found {found}: name another column"
            return Document(place=place, problem=problem)
    if len(values) == 2:
        return Document(prompt=values[0] or "", completion=values[1] or "", place=place)
    return Document(text=values[0] or "", place=place)


def _chat(config: DataConfig, number: int, value: Any) -> list[dict[str, Any]]:
    """The turns of a chat.

    Turns of mixed shape come as JSON, and a key that only some turns have comes as null in the
    others.
    """
    value = json.loads(value) if isinstance(value, str) else value or []
    turns = [json.loads(turn) if isinstance(turn, str) else turn for turn in value]
    turns = [{k: v for k, v in turn.items() if v is not None or k == "content"} for turn in turns]
    if not all("role" in turn for turn in turns):
        raise DataError(
            f"{_where(config)}: document {number}: expected turns with role and content in column "
            f"{config.messages_field!r}, found {', '.join(turns[0])}"
        )
    return turns


def _name(config: DataConfig) -> str:
    assert config.name is not None
    return config.name


def _is_folder(config: DataConfig) -> bool:
    return Path(_name(config)).is_dir()


def _where(config: DataConfig) -> str:
    if config.files is not None:
        return config.files[0] if len(config.files) == 1 else f"{config.files[0]} and others"
    return _name(config) if config.config is None else f"{config.name} ({config.config})"


def _revision(config: DataConfig) -> str:
    """The commit of the hub dataset.

    What a branch's name points to changes, so recipe and reading are bound to the commit.
    """
    if config.revision is not None and re.fullmatch(r"[0-9a-f]{40}", config.revision):
        return config.revision
    import huggingface_hub as hub

    name = _name(config)
    try:
        revision = hub.HfApi().dataset_info(name, revision=config.revision).sha
        assert revision is not None
        return revision
    except Exception as error:  # offline, refused, unknown: each client has errors of its own
        folder = hub.constants.REPO_ID_SEPARATOR.join(["datasets", *name.split("/")])
        noted = Path(hub.constants.HF_HUB_CACHE, folder, "refs", config.revision or "main")
        if noted.is_file():
            return noted.read_text().strip()  # what was downloaded last
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(
            f"data.name: {name} cannot be found on the hub ({lines[0]}): check the name, the "
            "connection and HF_TOKEN, or set data.files to local files"
        ) from error
