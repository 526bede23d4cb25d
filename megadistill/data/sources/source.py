"""Text in: the documents of a corpus, one after the other, in an order that never changes.

A corpus is a registered source (`data.source`: the standard library of the running interpreter,
real text on every machine, or another distribution's), local files (`data.files`), or a dataset by
name (`data.name`). Each kind is one object, a `base.Source`. Documents are numbered from 0 in that
order; reading can start at any number, which is how tokenising resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from megadistill.config import DataConfig
from megadistill.config.sources import SOURCES
from megadistill.data.sources.base import Document, Source
from megadistill.data.sources.tables import TABLES
from megadistill.data.sources.text_files import TEXT_FILES, is_text
from megadistill.errors import DataError, MegadistillError, first_line
from megadistill.registry import Distribution

__all__ = ["Document", "count_documents", "documents", "resolved", "source_identity"]


_LOOKED_AT = 1000  # documents


def documents(config: DataConfig, start: int = 0) -> Iterator[Document]:
    """The corpus from document `start` on, at most `data.max_samples` documents in all.

    DataError: no such corpus, file or column; a file that cannot be read.
    """
    config = resolved(config)
    read = _source(config).read(config, start)
    if distribution(config) is not None:
        read = _checked(read, config)
    if config.max_samples is None:
        return read
    return islice(read, max(0, config.max_samples - start))


def resolved(config: DataConfig) -> DataConfig:
    """`config` with the columns that are read, where the corpus has columns.

    DataError: `data.*_field` names none, and none or several are found.
    """
    with _one_line(config):
        return _source(config).resolved(config)


def with_tools(config: DataConfig) -> DataConfig:
    """`config` with the column `tools`, where the corpus has one and no other is configured."""
    with _one_line(config):
        return _source(config).with_tools(config)


def source_identity(config: DataConfig) -> dict[str, Any]:
    """Returns the identity of the corpus, for the recipe: by content or revision, not by path.

    Which documents and in which order, but not how many: raising `data.max_samples` continues with
    the same corpus.
    """
    config = resolved(config)
    with _one_line(config):
        identity = _source(config).identity(config)
    outside = distribution(config)
    if outside is None:
        return identity
    return identity | {"source": config.source, "distribution": outside.name}


def source_version(config: DataConfig) -> dict[str, str]:
    """Returns {distribution: version} for a source of another distribution, else {}."""
    outside = distribution(config)
    return {} if outside is None else {outside.name: outside.version}


def count_documents(config: DataConfig) -> int | None:
    """How many documents there are at most, where that is known without reading: for progress."""
    with _one_line(config):
        known = _source(config).count(config)
    counts = [n for n in (known, config.max_samples) if n is not None]
    return min(counts) if counts else None


def holds_turns(config: DataConfig) -> bool:
    """Whether prompts and completions are lists of turns: the first with a completion decides."""
    for document in islice(documents(config), _LOOKED_AT):
        if document.problem is None and document.completion:
            return any(isinstance(v, list) for v in (document.prompt, document.completion))
    return False


def distribution(config: DataConfig) -> Distribution | None:
    """Returns the distribution that registers `data.source`; None for megadistill's own sources."""
    return None if config.source is None else SOURCES.distribution(config.source)


def _source(config: DataConfig) -> Source:
    """The object that reads this kind of corpus."""
    if config.source is not None:
        return SOURCES.get(config.source, key="data.source")
    if config.files is not None:
        if config.split != "train":
            raise DataError(
                f"data.split: data.files have no splits, found {config.split!r}: leave data.split "
                "out, and name that split's files"
            )
        return TEXT_FILES if is_text(config) else TABLES
    if config.name is not None:
        return TABLES
    raise DataError("data: no corpus: set data.source, data.files or data.name")


def _checked(read: Iterator[Any], config: DataConfig) -> Iterator[Document]:
    """The documents of another distribution's source. DataError for anything else it gives."""
    with _one_line(config):
        for document in read:
            if not isinstance(document, Document):
                raise DataError(
                    f"data.source: {config.source}: gave a {type(document).__name__}, expected a "
                    "megadistill.data.sources.base.Document"
                )
            yield document


@contextmanager
def _one_line(config: DataConfig) -> Iterator[None]:
    """Errors of another distribution's source become a DataError that names the source."""
    try:
        yield
    except MegadistillError:
        raise
    except Exception as error:
        if distribution(config) is None:
            raise
        said = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"data.source: {config.source}: cannot be read: {said}") from error
