"""A teacher with another tokenizer: the same text in its tokens, and where both have read as much.

A token store holds the student's tokens. The teacher reads the same text in tokens of its own, and
where a token of either ends after the same bytes of a piece, both hidden states predict the
continuation of one text:

    student   The | _qui | ck | _brown | _fox
    teacher   The | _quick | _bro | wn | _fox
    rows        0     -1      1      3      4

A piece (a document, or what a sequence holds of one) is compared as bytes, and they come from the
tokens themselves: every id has its bytes, read from the vocabulary as the tokenizer's decoder reads
it, and checked against that decoder once. Offsets would not do: they count characters, some
tokenizers trim them, and of a character that takes several tokens they say nothing. Nor can a
student's piece be encoded again, since it may begin or end within a word or a character.

Two positions are aligned where their ends *and all bytes before them* are equal. So what a
tokenizer does to a text (Unicode normalisation, unknown characters) can cost alignments, from there
to the end of the piece, and never makes a wrong one.

Markers: the end of a document, and its begin where both sides have one, count as a byte that no
UTF-8 text has. So the student's markers are aligned with the teacher's, and the text behind them
goes on in step. Other special tokens (a chat's) have no text: the teacher does not see them.

Cost, for 8 x 2,048 tokens of source code and vocabularies of 32,000: about 400,000 positions/s on
one core (40 ms), most of it the teacher's encoding, which takes all cores it is allowed.

Shapes: B sequences, T the student's positions, U the teacher's, N = B*T, P pieces, L tokens of one
piece, V the student's ids.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadistill.data.token_bytes import (
    leading_spaces,
    leading_tokens,
    plain_backend,
    special_ids,
    token_bytes,
)
from megadistill.data.tokenizer import begin_token

# Bytes that UTF-8 does not have. What is lost differs between the sides, so that it never matches.
BEGIN, END, LOST, TEACHERS_LOST = b"\xfc", b"\xfd", b"\xfe", b"\xff"
MULTIPLE = 64  # of the teacher's sequence length, so that few shapes occur
_MARKERS = re.compile(b"([\xfc\xfd])")
_CONTINUATION = bytes(range(0x80, 0xC0))


@dataclass(frozen=True)
class Aligned:
    """Holds the teacher's input, and the teacher's position for each of the student's.

    tokens_BU  int64: the teacher's ids, with a filler behind the last piece
    documents  each row's starts of pieces, and of the filler, so that nobody sees it; as
               `megadistill.models.attention.forward_inputs` takes them
    rows_N     int64: for each of the student's positions that of the teacher's, of [B*U], that has
               read the same; -1 where there is none
    longest    the teacher's tokens of the longest piece
    """

    tokens_BU: np.ndarray
    documents: list[np.ndarray]
    rows_N: np.ndarray
    longest: int


@dataclass(frozen=True)
class _Reading:
    """A piece as one side reads it. ends_L: how many bytes of it are read after each token."""

    ids_L: np.ndarray
    data: bytes
    ends_L: np.ndarray


class Alignment:
    """Alignment of one student and one teacher; made once (0.4 s for vocabularies of 32,000).

    Both need a fast tokenizer whose tokens stand for bytes: byte-level, or SentencePiece's with or
    without byte fallback. ConfigError for others, WordPiece among them.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        own = token_bytes(student, key="data.tokenizer", lost=LOST)
        self._teachers = token_bytes(teacher, key="teacher.model", lost=TEACHERS_LOST)
        self._backend = plain_backend(teacher)
        # A teacher's special token that stands in a text as characters is no special token.
        self._backend.encode_special_tokens = True
        self._adds_space = leading_spaces(self._backend, self._teachers, " a") > 1
        self._prefix, self._end = leading_tokens(teacher), teacher.eos_token_id
        self._filler = 0 if self._end is None else self._end
        self._begin = begin_token(student)
        self._begin_bytes = BEGIN if self._prefix else b""
        self._last = len(own) - 1
        self._spaced, self._spaced_V = _spaced_behind(student, own)
        if self._begin is not None:
            own[self._begin] = self._begin_bytes
        if student.eos_token_id is not None and self._end is not None:
            own[student.eos_token_id] = END
        # The second half: the same without the space that a tokenizer puts before a text.
        self._own = own + [text.removeprefix(b" ") for text in own]

    def align(
        self,
        tokens_BT: np.ndarray,
        documents: Sequence[np.ndarray],
        padding_B: np.ndarray | None = None,
    ) -> Aligned:
        """The rows of a batch as the teacher reads them.

        tokens_BT: the student's ids, of any integer dtype. documents: each row's starts of pieces.
        padding_B: tokens of padding at each row's end, the last piece of `documents`. The teacher
        reads none of them, and their positions have -1.

        The teacher's begin tokens stand where the student's stands. Of a student that has none the
        store does not say whether a row's first piece is a document's start: they stand before
        every piece but one that begins within a character. The teacher's end token stands where
        the student's does, within a piece too (documents in `data.pack: concat`, a chat's turns).

        Of a piece that begins or ends within a character, the teacher does not see that character;
        positions within it have -1.
        """
        tokens_BT = np.minimum(np.asarray(tokens_BT).astype(np.int64), self._last)
        if padding_B is None:
            padding_B = np.zeros(len(tokens_BT), np.int64)
        pieces = [
            (row, tokens_L, n > 0)
            for row, (tokens_T, starts) in enumerate(zip(tokens_BT, documents, strict=True))
            for n, tokens_L in enumerate(_pieces(tokens_T, starts, int(padding_B[row])))
        ]
        students = [self._student_reads(tokens_L, starts=new) for _, tokens_L, new in pieces]
        teachers = self._teacher_reads([student.data for student in students])
        rows_P = np.array([row for row, _, _ in pieces])
        tokens_BU, starts, begins_P = _lay_out(teachers, rows_P, len(tokens_BT), self._filler)
        T = tokens_BT.shape[1]
        rows_BT = np.full((len(tokens_BT), T), -1, np.int64)
        found = [
            _rows(student, teacher, begin)
            for student, teacher, begin in zip(students, teachers, begins_P, strict=True)
        ]
        rows_BT[np.arange(T) < T - padding_B.reshape(-1, 1)] = np.concatenate(found)
        longest = max(len(teacher.ids_L) for teacher in teachers)
        return Aligned(tokens_BU, starts, rows_BT.reshape(-1), longest)

    def _student_reads(self, tokens_L: np.ndarray, *, starts: bool) -> _Reading:
        """starts: the piece is known to be a document's start, begin token or not."""
        spaced_L = np.append(starts and self._spaced, self._spaced_V[tokens_L[:-1]])
        chunks = [self._own[i] for i in (tokens_L + spaced_L * (self._last + 1)).tolist()]
        if tokens_L[0] == self._begin:  # which may be the end token, too
            chunks[0] = self._begin_bytes
        return _reading(tokens_L, chunks)

    def _teacher_reads(self, pieces: list[bytes]) -> list[_Reading]:
        splits = [_MARKERS.split(data) for data in pieces]  # text, marker, text, ..., text
        texts = [_text(part) for split in splits for part in split[::2]]
        if self._adds_space:  # to one that is there, too: let it be that one, as within a text
            texts = [text.removeprefix(" ") for text in texts]
        encodings = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        return [self._with_markers(split, encodings) for split in splits]

    def _with_markers(self, split: list[bytes], encodings: Iterator[Any]) -> _Reading:
        ids: list[int] = []
        chunks: list[bytes] = []
        if self._begin is None and not _cut(split[0]):
            ids, chunks = [*self._prefix], [b""] * len(self._prefix)
        for n, part in enumerate(split):
            if part == END and n % 2:
                ids.append(self._end)
                chunks.append(END)
            elif n % 2:
                ids += self._prefix
                chunks += [b""] * (len(self._prefix) - 1) + [BEGIN]
            else:
                found = next(encodings).ids
                ids += found
                chunks += _without_own_space([self._teachers[i] for i in found], part)
        return _reading(np.array(ids, np.int64), chunks, _cut(split[0]))


def _pieces(tokens_T: np.ndarray, starts: np.ndarray, padding: int) -> list[np.ndarray]:
    pieces = np.split(tokens_T, np.asarray(starts[1:], np.int64))
    return pieces[:-1] if padding else pieces


def _spaced_behind(student: Any, texts: list[bytes]) -> tuple[bool, np.ndarray]:
    """Whether the tokenizer puts a space before a text; and, bool [V], behind which ids."""
    backend, special, begin = plain_backend(student), special_ids(student), begin_token(student)
    spaced = leading_spaces(backend, texts, "a") > 0
    spaced_V = np.zeros(len(texts), bool)
    markers = [student.convert_ids_to_tokens(i) for i in special if not texts[i]]
    if markers:
        spaced_V[special] = leading_spaces(backend, texts, f"{markers[0]}a") > 0
    if begin is not None:
        spaced_V[begin] = spaced
    return spaced, spaced_V


def _reading(ids_L: np.ndarray, chunks: list[bytes], skipped: bytes = b"") -> _Reading:
    """chunks: each token's bytes, behind those that are `skipped`, which no token has."""
    read_L = np.cumsum(np.fromiter(map(len, chunks), np.int64, len(chunks)))
    ends_L = np.where(read_L > 0, read_L + len(skipped), 0)
    return _Reading(ids_L, skipped + b"".join(chunks), ends_L)


def _cut(data: bytes) -> bytes:
    """Returns the leading bytes that belong to a character that begins before `data`."""
    return data[: len(data) - len(data.lstrip(_CONTINUATION))]


def _text(data: bytes) -> str:
    """`data` as text, without the parts of characters at its beginning and end.

    What is no UTF-8 within it becomes U+FFFD, other bytes, behind which nothing is aligned.
    """
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data.lstrip(_CONTINUATION))


def _without_own_space(chunks: list[bytes], data: bytes) -> list[bytes]:
    """The bytes of the teacher's tokens of _text(data), as parts of `data`.

    A space that the teacher's tokenizer has put before the text is no part of it. Whether it does
    may depend on the text, so they are counted.
    """
    if _spaces(b"".join(chunks)) == _spaces(data.lstrip(_CONTINUATION)) + 1:
        return [chunks[0].removeprefix(b" "), *chunks[1:]]
    return chunks


def _spaces(data: bytes) -> int:
    return len(data) - len(data.lstrip(b" "))


def _lay_out(
    teachers: list[_Reading], rows_P: np.ndarray, count: int, filler: int
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """(tokens_BU, each row's starts, where in [B*U] each piece begins) of `count` rows."""
    lengths_P = np.array([len(teacher.ids_L) for teacher in teachers])
    lengths_B = np.bincount(rows_P, lengths_P, count).astype(np.int64)
    U = MULTIPLE * max(1, -(-int(lengths_B.max()) // MULTIPLE))
    tokens_BU = np.full((count, U), filler, np.int64)
    before_P = np.cumsum(lengths_P) - lengths_P
    within_P = before_P - (np.cumsum(lengths_B) - lengths_B)[rows_P]
    for row, begin, teacher in zip(rows_P, within_P, teachers, strict=True):
        tokens_BU[row, begin : begin + len(teacher.ids_L)] = teacher.ids_L
    starts = []
    for row in range(count):
        # A piece may have no token of the teacher's: then another begins where it does.
        edges = np.unique(np.append(within_P[rows_P == row], lengths_B[row]))
        starts.append(edges[edges < U])
    return tokens_BU, starts, within_P + rows_P * U


def _rows(student: _Reading, teacher: _Reading, begin: int) -> np.ndarray:
    """int64 [L]: `begin` + the last of the teacher's positions that has read the same, or -1."""
    same = _common(student.data, teacher.data)
    last_L = np.searchsorted(teacher.ends_L, student.ends_L, side="right") - 1
    # Index -1, of none that has read so little, is the guard's.
    ends_L = np.append(teacher.ends_L, -1)[last_L]
    return np.where((ends_L == student.ends_L) & (ends_L <= same), last_L + begin, -1)


def _common(a: bytes, b: bytes) -> int:
    """How many bytes they have in common from the beginning."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    differ = np.frombuffer(a, np.uint8, size) != np.frombuffer(b, np.uint8, size)
    return int(np.argmax(differ))
