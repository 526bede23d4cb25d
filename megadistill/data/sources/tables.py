"""Corpora made of rows: local parquet, json, arrow files, or a dataset by its name (hub.py).

Local files are read one after the other, each with its own types, and as a stream. Files that are
shuffled as a whole are copied to the cache of `datasets` first, where any row can be reached.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

from megadistill.config import DataConfig
from megadistill.data.sources import arrow_rows, corpus_columns, hub, json_rows, text_files
from megadistill.data.sources.arrow_values import Problem, text_problem, value_problem
from megadistill.data.sources.base import Document, Source
from megadistill.data.sources.compressed import shown
from megadistill.data.sources.row import Row, Skip
from megadistill.errors import BadDocumentError, DataError
from megadistill.storage.counter_rng import permutation

log = logging.getLogger(__name__)

# A stream cannot be shuffled whole: it is shuffled within windows of so many documents. Windows
# rather than a rolling buffer, so that reading can start at any document.
WINDOW = 1000
_SHUFFLE_ALL, _SHUFFLE_WINDOW = 5, 6  # purposes of the permutations
_MIB = 1 << 20


class Tables(Source):
    """Rows of local files, or of a dataset by its name."""

    def read(self, config: DataConfig, start: int) -> Iterator[Document]:
        """The documents from number `start` on. `config` names its columns (see `resolved`).

        Raises DataError before the first one where there is no such corpus or column.
        """
        for row in _ordered(config, start):
            yield _document(config, row)

    def identity(self, config: DataConfig) -> dict[str, Any]:
        """The corpus in the recipe: by content or revision, and the columns that are read."""
        fields: dict[str, Any] = {"fields": list(corpus_columns.configured(config).values())}
        if config.shuffle:
            window = WINDOW if config.streaming else None
            fields["shuffle"] = {"seed": config.seed, "window": window}
        if config.files is not None:
            paths = text_files.find(config.files)
            return {
                "source": text_files.kind(paths),
                "content": text_files.content_identity(paths),
                **fields,
            }
        return {**hub.identity(config), **fields}

    def count(self, config: DataConfig) -> None:
        """How many documents there are is not known without reading."""

    def resolved(self, config: DataConfig) -> DataConfig:
        """`config` with the columns that are read. DataError: they are not configured nor found."""
        if set(corpus_columns.configured(config)) - {"tools_field"}:
            return config
        found = _first_columns(config)
        if found is not None:
            return corpus_columns.detect(config, *found)
        source = _local(config)
        assert source is not None
        for row in source.rows([], 0):
            raise BadDocumentError(f"{row.place}: {row.problem}")
        raise DataError(f"{_where(config)}: the corpus is empty: none of its files has a row")

    def with_tools(self, config: DataConfig) -> DataConfig:
        """`config` with the column `tools`, where the corpus has one and no other is configured."""
        if config.tools_field is not None:
            return config
        source = _local(config)
        # Any file: the first one may hold the chats without tools.
        there = "tools" in hub.columns(config) if source is None else _has_column(source, "tools")
        return config.model_copy(update={"tools_field": "tools"}) if there else config


TABLES = Tables()


def _first_columns(config: DataConfig) -> tuple[list[str], str] | None:
    """(the columns of the first file that has rows, its name); None: there is no such file."""
    source = _local(config)
    if source is None:
        return hub.columns(config), hub.shown_name(config)
    for path in source.paths:
        found = source.columns(path)
        if found is not None:
            return found, shown(path)
    return None


class LocalFiles:
    """Local files of one kind."""

    def __init__(self, kind: str, paths: list[str], limit: int) -> None:
        self.kind, self.paths, self.limit = kind, paths, limit

    def columns(self, path: str, wanted: list[str] | None = None) -> list[str] | None:
        """The columns of a file; None: it has no rows, or only rows that are no objects.

        wanted: enough where these are found.
        """
        if self.kind == "json":
            return json_rows.columns(path, wanted, limit=self.limit)
        return arrow_rows.columns(path, self.kind)

    def rows(self, fields: list[str], start: int) -> Iterator[Row]:
        """The rows of all files from number `start` on, with the file in their place."""
        skip = Skip(start)
        for path in self.paths:
            if self.kind == "json":
                rows = json_rows.read(path, fields, skip, self.limit)
            else:
                rows = arrow_rows.read(path, self.kind, fields, skip)
            name = shown(path)
            for row in rows:
                yield row._replace(place=f"{name}: {row.place}")


def _no_tools(config: DataConfig) -> DataError:
    return DataError(
        f"data.tools_field: {_where(config)}: there is no column {config.tools_field!r}: set "
        "data.tools_field to one that is there, or leave it out"
    )


def _has_column(source: LocalFiles, name: str) -> bool:
    return any(name in (source.columns(path) or []) for path in source.paths)


def _local(config: DataConfig) -> LocalFiles | None:
    """The local files of a corpus; None: `datasets` has to read it."""
    limit = config.max_document_mib * _MIB
    if config.files is not None:
        paths = text_files.find(config.files)
        return LocalFiles(text_files.kind(paths), paths, limit)
    found = hub.folder_files(config)
    return None if found is None else LocalFiles(*found, limit)


def _ordered(config: DataConfig, start: int) -> Iterator[Row]:
    fields = list(corpus_columns.configured(config).values())
    source = _local(config)
    if source is None:
        return _of_name(config, fields, start)
    needed = [field for field in fields if field != config.tools_field]
    for path in source.paths:
        found = source.columns(path, needed)
        if found is not None:
            corpus_columns.check(config, found, shown(path))
    if config.tools_field is not None and not _has_column(source, config.tools_field):
        raise _no_tools(config)
    if not config.shuffle:
        return source.rows(fields, start)
    if config.streaming:
        return _by_window(config, lambda first: source.rows(fields, first), start)
    return _of_all(config, source, fields, start)


def _of_name(config: DataConfig, fields: list[str], start: int) -> Iterator[Row]:
    """The rows of a dataset that `datasets` reads."""
    import datasets

    dataset = hub.load(config, fields)
    names = hub.column_names(dataset, config)
    corpus_columns.check(config, names, hub.shown_name(config))
    if config.tools_field is not None and config.tools_field not in names:
        raise _no_tools(config)
    if isinstance(dataset, datasets.Dataset):
        order = None
        if config.shuffle:
            order = permutation(len(dataset), config.seed, _SHUFFLE_ALL)
            log.info("%s: %d documents shuffled, seed %d", config.name, len(order), config.seed)
        return hub.rows_of_all(dataset, config, fields, start, order)
    if config.shuffle:
        return _by_window(config, lambda first: hub.rows(dataset, config, fields, first), start)
    return hub.rows(dataset, config, fields, start)


def _by_window(config: DataConfig, rows: Any, start: int) -> Iterator[Row]:
    """A stream, shuffled within windows. rows(first): its rows from number `first` on."""
    log.info(
        "%s: documents shuffled in windows of %d, seed %d", _where(config), WINDOW, config.seed
    )
    window, passed = divmod(start, WINDOW)
    stream = iter(rows(window * WINDOW))
    while held := list(itertools.islice(stream, WINDOW)):
        order = permutation(len(held), config.seed, _SHUFFLE_WINDOW, window)
        yield from (held[i] for i in order[passed:])
        window, passed = window + 1, 0


def _of_all(config: DataConfig, source: LocalFiles, fields: list[str], start: int) -> Iterator[Row]:
    """All rows of local files, shuffled: copied once, as JSON, to the cache of `datasets`."""
    dataset = hub.copied(
        _json_rows,
        {
            "kind": source.kind,
            "paths": source.paths,
            "limit": source.limit,
            "fields": fields,
            "content": text_files.content_identity(source.paths),
        },
    )
    order = permutation(len(dataset), config.seed, _SHUFFLE_ALL)
    log.info("%s: %d documents shuffled, seed %d", _where(config), len(order), config.seed)
    order = order[start:]
    for at in range(0, len(order), arrow_rows.BATCH):
        for text in dataset[order[at : at + arrow_rows.BATCH]]["row"]:
            place, values, problem = json.loads(text)
            yield Row(place, tuple(values), problem)


def _json_rows(
    kind: str, paths: list[str], limit: int, fields: list[str], content: str
) -> Iterator[dict[str, str]]:
    """Rows for the copy. content: of the files; the copy is named by its arguments."""
    for row in LocalFiles(kind, paths, limit).rows(fields, 0):
        problem = row.problem or _first_problem(row.values, limit)
        yield {"row": json.dumps([row.place, () if problem else row.values, problem])}


def _first_problem(values: tuple[Any, ...], limit: int) -> str | None:
    return next((p for value in values if (p := value_problem(value, limit=limit))), None)


def _document(config: DataConfig, row: Row) -> Document:
    place, limit = row.place, config.max_document_mib * _MIB
    if row.problem is not None:
        return Document(place=place, problem=row.problem)
    found = dict(zip(corpus_columns.configured(config), row.values, strict=True))
    for key, value in found.items():
        why = value.why if isinstance(value, Problem) else None
        chat = key in ("messages_field", "tools_field")
        chat = chat or (key != "text_field" and isinstance(value, list))  # of turns
        if why is None:
            why = (value_problem if chat else text_problem)(value, limit=limit)
        if why is not None:
            column = getattr(config, key)
            return Document(place=place, problem=f"column {column!r}: {why}")
    tools = found.get("tools_field")
    if "messages_field" in found:
        return Document(messages=found["messages_field"] or [], tools=tools, place=place)
    if "completion_field" in found:
        prompt, completion = found["prompt_field"] or "", found["completion_field"] or ""
        return Document(prompt=prompt, completion=completion, tools=tools, place=place)
    return Document(text=found["text_field"] or "", place=place)


def _where(config: DataConfig) -> str:
    if config.files is not None:
        first = shown(config.files[0])
        return first if len(config.files) == 1 else f"{first} and others"
    return hub.shown_name(config)
