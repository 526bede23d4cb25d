"""Encodes a document, or a piece of one, to token ids and its loss mask in a tokenising process.

Imports neither torch nor, for plain text, transformers: a process starts in 0.2 s and stays small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megadistill.data.chat.encoder import ChatEncoder, ChatSpec
from megadistill.errors import BadDocumentError


@dataclass(frozen=True)
class Unit:
    """Unit tokenised in one go: a piece of a text, or a whole chat or prompt with completion."""

    document: int
    piece: int = 0
    first: bool = True
    last: bool = True
    text: str | None = None
    # Chats as the corpus holds them; `data.conversation` reads them. A prompt and a completion are
    # texts, or lists of turns.
    messages: Any = None
    tools: Any = None
    prompt: Any = None
    completion: Any = None
    # Where the document stands in the corpus, for messages: file and row, or a name and a number.
    place: str = ""
    # Why the document cannot be used; such a unit has no tokens.
    problem: str | None = None

    @property
    def characters(self) -> int:
        if self.problem is not None:
            return 0
        values = (self.text, self.messages, self.prompt, self.completion)
        return sum(map(_characters, values))


@dataclass(frozen=True)
class EncoderSpec:
    """Holds what a tokenising process needs of a tokenizer.

    `backend`: the tokenizers library's JSON. `chat`: the chat template, for chats only. `columns`:
    the corpus' columns by their `data` key, for messages.
    """

    backend: str
    eos: int
    bos: int | None
    chat: ChatSpec | None = None
    columns: dict[str, str] = field(default_factory=dict)


class Encoder:
    """Made once in each tokenising process."""

    def __init__(self, spec: EncoderSpec) -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(spec.backend)
        # A tokenizer.json may carry both; either would change the text that is learned from.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.begin = [] if spec.bos is None else [spec.bos]
        self.eos = spec.eos
        self.chat = None
        if spec.chat is not None:
            self.chat = ChatEncoder(
                spec.chat, backend=spec.backend, eos=spec.eos, columns=spec.columns
            )
        self._columns = spec.columns

    def encode(self, units: list[Unit]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(ids uint32 [n], lengths int64 [units], loss mask uint8 [n] or None: all is learned).

        A unit of length 0 is a document without text: it is dropped, and has no bos or eos either.
        """
        usable = next((unit for unit in units if unit.problem is None), None)
        if usable is None:
            return np.empty(0, np.uint32), np.zeros(len(units), np.int64), None
        if usable.text is not None:
            return *_joined(self._texts(units)), None
        one = self._completion if usable.messages is None else self._messages
        ids, masks = zip(*(one(u) if u.problem is None else ([], []) for u in units), strict=True)
        mask = np.concatenate([np.asarray(m, dtype=np.uint8) for m in masks])
        return *_joined(ids), mask

    def answer(self, units: list[Unit]) -> tuple[dict[int, str], tuple]:
        """({index of a unit that cannot be encoded: why}, what `encode` gives for the others)."""
        problems: dict[int, str] = {}
        try:
            return problems, self.encode(units)
        except BadDocumentError:
            units = list(units)  # one by one, to find all of them
        for index, unit in enumerate(units):
            try:
                self.encode([unit])
            except BadDocumentError as error:
                problems[index] = str(error)
                units[index] = replace(unit, problem=str(error))
        return problems, self.encode(units)

    def _texts(self, units: list[Unit]) -> list[list[int]]:
        result = []
        for unit, ids in zip(units, self._ids([u.text or "" for u in units]), strict=True):
            if unit.problem is not None:
                ids = []
            elif ids or not (unit.first and unit.last):
                ids = (self.begin if unit.first else []) + ids + ([self.eos] if unit.last else [])
            result.append(ids)
        return result

    def _completion(self, unit: Unit) -> tuple[list[int], list[int]]:
        # Tokenised apart: no token lies across the border, so the mask is exact, and the prompt's
        # tokens are those that a user's prompt will have.
        if self.chat is not None:
            return self.chat.encode_completion(unit.prompt, unit.completion, unit.tools)
        for column in ("prompt", "completion"):
            if not isinstance(getattr(unit, column) or "", str):
                name = self._columns.get(f"{column}_field", column)
                raise BadDocumentError(
                    f"column {name!r}: expected text as in the corpus' first document, found a chat"
                )
        prompt, completion = self._ids([unit.prompt or "", unit.completion or ""])
        if not completion:
            return [], []
        prompt = self.begin + prompt
        return prompt + completion + [self.eos], [0] * len(prompt) + [1] * (len(completion) + 1)

    def _messages(self, unit: Unit) -> tuple[list[int], list[int]]:
        assert self.chat is not None
        return self.chat.encode(unit.messages, unit.tools)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # The fast variant leaves out offsets, which are most of an encoding's memory.
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


def _characters(value: Any) -> int:
    """Returns the number of characters in a text, or in a chat's contents."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(value.get(key)) for key in ("content", "value", "text"))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _joined(parts: Iterable[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.asarray(ids, dtype=np.uint32) for ids in parts]
    return np.concatenate(arrays), np.array([len(a) for a in arrays], dtype=np.int64)
