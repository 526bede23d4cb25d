"""Text in: the documents of a corpus, one after the other, in an order that never changes.

A corpus is the standard library of the running interpreter (`data.source: python-stdlib`, real text
on every machine), local files (`data.files`), or a dataset by name (`data.name`). Documents are
numbered from 0 in that order; reading can start at any number, which is how tokenising resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from megadistill.config import DataConfig
from megadistill.data.sources import stdlib, tables, text_files
from megadistill.data.sources.document import Document
from megadistill.errors import DataError

__all__ = ["Document", "count_documents", "documents", "resolved", "source_identity"]


_LOOKED_AT = 1000  # documents


def documents(config: DataConfig, start: int = 0) -> Iterator[Document]:
    """The corpus from document `start` on, at most `data.max_samples` documents in all.

    DataError: no such corpus, file or column; a file that cannot be read.
    """
    config = resolved(config)
    if config.max_samples is None:
        return _reader(config).read(config, start)
    return islice(_reader(config).read(config, start), max(0, config.max_samples - start))


def resolved(config: DataConfig) -> DataConfig:
    """`config` with the columns that are read, where the corpus has columns.

    DataError: `data.*_field` names none, and none or several are found.
    """
    return tables.resolved(config) if _reader(config) is tables else config


def with_tools(config: DataConfig) -> DataConfig:
    """`config` with the column `tools`, where the corpus has one and no other is configured."""
    return tables.with_tools(config) if _reader(config) is tables else config


def source_identity(config: DataConfig) -> dict[str, Any]:
    """Returns the identity of the corpus, for the recipe: by content or revision, not by path.

    Which documents and in which order, but not how many: raising `data.max_samples` continues with
    the same corpus.
    """
    return _reader(config).identity(resolved(config))


def count_documents(config: DataConfig) -> int | None:
    """How many documents there are at most, where that is known without reading: for progress."""
    known = _reader(config).count(config)
    counts = [n for n in (known, config.max_samples) if n is not None]
    return min(counts) if counts else None


def holds_turns(config: DataConfig) -> bool:
    """Whether prompts and completions are lists of turns: the first with a completion decides."""
    for document in islice(documents(config), _LOOKED_AT):
        if document.problem is None and document.completion:
            return any(isinstance(v, list) for v in (document.prompt, document.completion))
    return False


def _reader(config: DataConfig) -> Any:
    """The module that reads this kind of corpus: read, identity, count."""
    if config.source == "python-stdlib":
        return stdlib
    if config.files is not None:
        if config.split != "train":
            raise DataError(
                f"data.split: data.files have no splits, found {config.split!r}: leave data.split "
                "out, and name that split's files"
            )
        return text_files if text_files.is_text(config) else tables
    if config.name is not None:
        return tables
    raise DataError("data: no corpus: set data.source, data.files or data.name")
