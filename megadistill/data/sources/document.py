"""Document of a corpus, as its source gives it."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megadistill.data.encode import Unit
from megadistill.data.pieces import PIECE, split_text
from megadistill.data.sources.compressed import ERRORS, TOO_LONG, open_bytes, reason, shown
from megadistill.errors import BadDocumentError, DataError

_CHUNK = 1 << 20  # bytes of a text file that are read at a time


@dataclass(frozen=True)
class Document:
    """Row or file, in one of four shapes. None of them: an empty row.

    `text`; `file`, a text file that is read piece by piece; `messages`, a chat as the corpus
    holds it, with its `tools`; `prompt` with `completion`, texts or lists of turns.
    """

    text: str | None = None
    file: str | None = None
    messages: Any = None
    tools: Any = None
    prompt: Any = None
    completion: Any = None
    # Where it stands in the corpus, for messages, and why it cannot be used.
    place: str = field(default="", compare=False)
    problem: str | None = None
    limit: int = field(default=1 << 30, compare=False)  # the most bytes of a file

    def units(self, number: int, *, piece: int = PIECE) -> Iterator[Unit]:
        """The document, numbered `number`, in units that are tokenised in one go."""
        place, problem = self.place, self.problem or self._file_problem()
        if problem is not None:
            yield Unit(number, place=place, problem=problem)
        elif self.messages is not None:
            yield Unit(number, messages=self.messages, tools=self.tools, place=place)
        elif self.completion is not None:
            yield Unit(
                number,
                prompt=self.prompt or "",
                completion=self.completion,
                tools=self.tools,
                place=place,
            )
        else:
            chunks = [self.text or ""] if self.file is None else _decoded(self.file, self.limit)
            pieces = split_text(chunks, piece=piece)
            index, text = 0, next(pieces)
            for following in pieces:
                yield Unit(number, index, index == 0, False, text, place=place)
                index, text = index + 1, following
            yield Unit(number, index, index == 0, True, text, place=place)

    def _file_problem(self) -> str | None:
        """Why a text file cannot be used.

        The file is read once to find out, before its first piece is handed on: what is in the store
        cannot be taken back. Decoding takes 1 s a GB, tokenising minutes.
        """
        if self.file is None:
            return None
        try:
            for _ in _decoded(self.file, self.limit):
                pass
        except BadDocumentError as error:
            return str(error)
        return None


def _decoded(file: str, limit: int) -> Iterator[str]:
    """The text of a file in chunks. BadDocumentError: it is damaged, no UTF-8, or too long."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    size = 0
    try:
        with open_bytes(file) as stream:
            while data := stream.read(_CHUNK):
                size += len(data)
                if size > limit:
                    raise BadDocumentError(TOO_LONG)
                yield utf8.decode(data)
            yield utf8.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = size - len(error.object) + error.start
        raise BadDocumentError(
            f"cannot be read as UTF-8 text: byte {error.object[error.start]:#04x} near byte "
            f"{max(at, 0) + 1}: convert the file to UTF-8"
        ) from error
    except ERRORS as error:
        if getattr(error, "errno", None) is not None:  # the system's, not the content's
            raise DataError(f"{shown(file)}: cannot be read: {reason(error)}") from error
        raise BadDocumentError(f"cannot be read: {reason(error)}") from error
