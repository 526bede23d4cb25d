"""Rows of json files, plain or compressed, read as a stream.

A file holds one of three layouts, which its beginning decides:

    {"text": "a"}        lines: one object a line. Blank lines are no rows.
    {"text": "b"}

    [{"text": "a"},      array: of objects, or of texts, which are then the column `text`
     {"text": "b"}]

    {                    objects: one after the other, each over any number of lines
      "text": "a"
    }

Every value is what the file says. `datasets` infers one type for a column from a part of the file:
it turns texts that look like dates into dates, pads objects with nulls, and fails where a later
part has another type. Nothing is inferred here, so that other columns never matter.

A damaged line is the problem of one document. In the other layouts what follows cannot be found
again, so the file is refused.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import islice
from typing import Any

from megadistill.data.sources import compressed
from megadistill.data.sources.compressed import ERRORS, open_bytes, reason, shown
from megadistill.data.sources.row import Row, Skip
from megadistill.errors import BadDocumentError, DataError

_CHUNK = 1 << 20  # characters that an array is read by
_SAMPLE = 1000  # rows whose keys are the columns of a file
_MANY = 100_000  # rows that may lack a column that is asked for: a second of reading
_SPACE = re.compile(r"[ \t\r\n]*")
_MAX_DIGITS = 4000  # Python converts no longer integers


class Repeated(dict):
    """An object that has a key twice. Which of the two values is meant nobody can know."""

    key: str = ""


def read(path: str, fields: list[str], skip: Skip, limit: int) -> Iterator[Row]:
    """The rows of a file. `limit`: the most bytes of one row.

    DataError: the file cannot be read.
    """
    with _errors(path), open_bytes(path) as stream:
        for place, value in _values(path, stream, skip, limit):
            yield _row(place, value, fields)


def columns(path: str, wanted: list[str] | None = None, *, limit: int) -> list[str] | None:
    """The columns of a file, by its first 1,000 rows; None: none of them is an object.

    wanted: stop where all of these were found, and look further for them.
    """
    found: dict[str, None] = {}
    objects = 0
    with _errors(path), open_bytes(path) as stream:
        rows = _SAMPLE if wanted is None else _MANY
        for _, value in islice(_values(path, stream, Skip(), limit), rows):
            if isinstance(value, dict):
                objects += 1
                found.update(dict.fromkeys(value))
            if wanted is not None and all(name in found for name in wanted):
                break
    return list(found) if objects else None


@contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except BadDocumentError as error:
        raise DataError(f"{shown(path)}: {error}") from error
    except ERRORS as error:
        raise DataError(f"{shown(path)}: cannot be read: {reason(error)}") from error


class _Problem(str):
    """Stands for a row that cannot be used: why."""


def _row(place: str, value: Any, fields: list[str]) -> Row:
    if isinstance(value, _Problem):
        return Row(place, problem=str(value))
    if not isinstance(value, dict):
        found = "an array" if isinstance(value, list) else ascii(value)[:40]
        return Row(place, problem=f"expected an object with columns, found {found}")
    if isinstance(value, Repeated) and value.key in fields:
        return Row(place, problem=f"column {value.key!r} is there twice")
    return Row(place, tuple(value.get(field) for field in fields))


def _values(path: str, stream: BufferedReader, skip: Skip, limit: int) -> Iterator[tuple[str, Any]]:
    """(place, decoded value) of each row that is not passed over."""
    # Looked at before a line is read: all of an array may stand in one line.
    if stream.peek(1).lstrip().startswith(b"["):
        values = _objects(path, _chunks(path, b"", stream), True, limit)
        for number, (_, value) in enumerate(values):
            if not skip.take(1):
                yield f"row {number}", {"text": value} if isinstance(value, str) else value
        return
    lines = _lines(stream, limit)
    first = next(lines, None)
    if first is None:
        return
    number, line = first
    if _is_one_object(line):
        yield from _parsed_lines(first, lines, skip)
        return
    assert line is not None
    chunks = _chunks(path, b"\n" * (number - 1) + line, stream)
    for number, value in _objects(path, chunks, False, limit):
        if not skip.take(1):
            yield f"line {number}", value


def _is_one_object(line: bytes | None) -> bool:
    """Whether the first line is a row by itself, or at least no beginning of a longer one."""
    if line is None:
        return True
    text = line.decode(errors="replace").strip()
    try:
        end = json.JSONDecoder().raw_decode(text)[1]
    except json.JSONDecodeError as error:
        return error.pos < len(text)
    except (ValueError, RecursionError):
        return True
    return end == len(text) or text[end:].lstrip()[:1] not in "{["


def _lines(stream: BufferedReader, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line) of each line that is not blank. None: it is longer than `limit`."""
    number = 0
    while line := stream.readline(limit + 2):
        number += 1
        if len(line) > limit and not line.endswith(b"\n"):
            while (rest := stream.readline(_CHUNK)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        elif not line.isspace():
            yield number, line


def _parsed_lines(
    first: tuple[int, bytes | None], lines: Iterator[tuple[int, bytes | None]], skip: Skip
) -> Iterator[tuple[str, Any]]:
    if not skip.take(1):
        yield f"line {first[0]}", _parsed(first[1])
    for number, line in lines:
        if skip.left:  # counted, not parsed
            skip.left -= 1
        else:
            yield f"line {number}", _parsed(line)


def _parsed(line: bytes | None) -> Any:
    if line is None:
        return _Problem(compressed.TOO_LONG)
    try:
        return decode(line.decode())
    except UnicodeDecodeError as error:
        return _Problem(f"no UTF-8 text: byte {line[error.start]:#04x} at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return _Problem(f"no JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return _Problem("no JSON that can be read: it is nested too deeply")


def decode(text: str) -> Any:
    """The value of a JSON text, in which integers may have any number of digits."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # too many digits for int()
        return _LONG_INTEGERS.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    result = Repeated(found)
    keys = [key for key, _ in pairs]
    result.key = next(key for i, key in enumerate(keys) if key in keys[:i])
    return result


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_LONG_INTEGERS = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _chunks(path: str, start: bytes, stream: BufferedReader) -> Iterator[str]:
    """The text of `start` and of what follows in the stream."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    try:
        yield utf8.decode(start)
        while data := stream.read(_CHUNK):
            yield utf8.decode(data)
        utf8.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)}: no UTF-8 text: {error.reason}") from error


def _objects(
    path: str, chunks: Iterator[str], is_array: bool, limit: int
) -> Iterator[tuple[int, Any]]:
    """(line from 1, value) of each element of an array, or of objects one after the other."""
    reader = _Reader(path, chunks, limit)
    if is_array:
        reader.expect("[")
        if reader.peek() == "]":
            reader.expect("]")
        else:
            while True:
                yield reader.value()
                if reader.peek() == "]":
                    reader.expect("]")
                    break
                reader.expect(",")
        if reader.peek():
            raise reader.error("more text behind the end of the array")
    else:
        while reader.peek():
            yield reader.value()


class _Reader:
    """Reads JSON values from a stream of text. Holds one value and one chunk."""

    def __init__(self, path: str, chunks: Iterator[str], limit: int) -> None:
        self._path, self._chunks, self._limit = path, chunks, limit
        self._text, self._at, self._line = "", 0, 1

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._pass(_SPACE.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.error(
                f"expected {character!r}, found {found!r}" if found else "it ends early"
            )
        self._pass(self._at + 1)

    def value(self) -> tuple[int, Any]:
        self.peek()
        line = self._line
        while True:
            try:
                value, end = self._decode()
            except json.JSONDecodeError as error:
                # Near the end of what was read, more text may complete the value.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                if cut and self._more():
                    continue
                self._pass(error.pos)
                what = "it ends in the middle of a value" if cut else f"no JSON: {error.msg}"
                raise self.error(what) from error
            except RecursionError as error:
                raise self.error("it is nested too deeply") from error
            else:
                # A number at the end of what was read may go on.
                if end < len(self._text) or self._text[end - 1] in '}]"' or not self._more():
                    self._pass(end)
                    return line, value

    def _decode(self) -> tuple[Any, int]:
        try:
            return _DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return _LONG_INTEGERS.raw_decode(self._text, self._at)

    def error(self, what: str) -> DataError:
        return DataError(f"{shown(self._path)}: line {self._line}: {what}")

    def _pass(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        held = len(self._text) - self._at
        if held > self._limit:
            raise self.error(compressed.TOO_LONG)
        # As much again as is held: a long value is then decoded a logarithmic number of times.
        parts, wanted = [self._text[self._at :]], max(_CHUNK, held)
        for chunk in self._chunks:
            parts.append(chunk)
            wanted -= len(chunk)
            if wanted <= 0:
                break
        self._text, self._at = "".join(parts), 0
        return len(self._text) > held
