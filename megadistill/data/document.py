"""One document of a corpus, as its source gives it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec

from megadistill.data.encode import Unit
from megadistill.data.pieces import PIECE, split_text
from megadistill.errors import DataError


@dataclass(frozen=True)
class Document:
    """One row or file, in one of four shapes. None of them: an empty row.

    `text`; `file`, a text file that is read piece by piece; `messages`, a chat with {"role",
    "content", ...} a turn; `prompt` with `completion`.
    """

    text: str | None = None
    file: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    # Where it stands in the corpus, for messages, and why it cannot be used.
    place: str = field(default="", compare=False)
    problem: str | None = None

    def units(self, number: int, *, piece: int = PIECE) -> Iterator[Unit]:
        """The document, numbered `number`, in units that are tokenised in one go."""
        place = self.place
        if self.problem is not None:
            yield Unit(number, place=place, problem=self.problem)
        elif self.messages is not None:
            yield Unit(number, messages=self.messages, place=place)
        elif self.completion is not None:
            yield Unit(number, prompt=self.prompt or "", completion=self.completion, place=place)
        else:
            chunks = [self.text or ""] if self.file is None else _read(self.file)
            pieces = split_text(chunks, piece=piece)
            index, text = 0, next(pieces)
            for following in pieces:
                yield Unit(number, index, index == 0, False, text, place=place)
                index, text = index + 1, following
            yield Unit(number, index, index == 0, True, text, place=place)


def _read(file: str) -> Iterator[str]:
    try:
        with fsspec.open(file, "rt", encoding="utf-8", newline="", compression="infer") as stream:
            while chunk := stream.read(PIECE):
                yield chunk
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from error
