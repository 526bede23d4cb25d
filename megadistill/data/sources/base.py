"""Base class of data sources: one object gives the documents of a corpus, in a fixed order.

megadistill's own sources stand in this folder, a file each. Another distribution registers an
instance with an entry point `source.NAME` of the group `megadistill`; then `data.source: NAME`
reads it, with its parameters in `data.options`:

    class Poems(Source):
        def read(self, config, start):
            for number in range(start, config.options["poems"]):
                yield Document(text=poem(number), place=f"poem {number}")

    POEMS = Poems()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from megadistill.config import DataConfig
from megadistill.data.sources.document import Document

__all__ = ["Document", "Source"]


class Source(ABC):
    """Kind of corpus. Only `read` has to be defined."""

    @abstractmethod
    def read(self, config: DataConfig, start: int) -> Iterator[Document]:
        """Yields the documents from number `start` on.

        The order must be the same at every call with one configuration: tokenising resumes by a
        document's number. Raises DataError for a corpus that cannot be read.
        """

    def identity(self, config: DataConfig) -> dict[str, Any]:
        """Returns what decides the documents and their order, as JSON, for the recipe.

        A token store is continued only with an equal identity. It should follow from the content
        or its revision rather than from a path. `data.max_samples` is no part of it.
        """
        identity = {"split": config.split, "options": config.options}
        return identity | ({"shuffle": {"seed": config.seed}} if config.shuffle else {})

    def count(self, config: DataConfig) -> int | None:
        """Returns the number of documents where that is known without reading, for progress."""
        return None

    def resolved(self, config: DataConfig) -> DataConfig:
        """Returns `config` with the columns that are read, `data.*_field`.

        A source of chats sets `messages_field`, one of prompts with completions `prompt_field` and
        `completion_field`; so the token store gets a loss mask.
        """
        return config

    def with_tools(self, config: DataConfig) -> DataConfig:
        """Returns `config` with the column of tools, where the corpus has one."""
        return config
