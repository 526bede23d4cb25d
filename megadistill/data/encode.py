"""One document, or a piece of one, to token ids and its loss mask: what a tokenising process does.

Imports neither torch nor, for plain text, transformers: a process starts in 0.2 s and stays small.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megadistill.errors import BadDocumentError, DataError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Unit:
    """What is tokenised in one go: a piece of a text, or a whole chat or prompt with completion."""

    document: int
    piece: int = 0
    first: bool = True
    last: bool = True
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    # Where the document stands in the corpus, for messages: file and row, or a name and a number.
    place: str = ""
    # Why the document cannot be used; such a unit has no tokens.
    problem: str | None = None

    @property
    def characters(self) -> int:
        if self.problem is not None:
            return 0
        if self.messages is not None:
            return sum(len(m.get("content") or "") for m in self.messages)
        return len(self.text or "") + len(self.prompt or "") + len(self.completion or "")


@dataclass(frozen=True)
class EncoderSpec:
    """What a tokenising process needs of a tokenizer.

    `backend`: the tokenizers library's JSON. `chat`: the pickled transformers tokenizer, for chat
    templates only.
    """

    backend: str
    eos: int
    bos: int | None
    chat: bytes | None = None


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
        if spec.chat is not None:
            self.chat: Any = pickle.loads(spec.chat)  # noqa: S301

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
        prompt, completion = self._ids([unit.prompt or "", unit.completion or ""])
        if not completion:
            return [], []
        prompt = self.begin + prompt
        return prompt + completion + [self.eos], [0] * len(prompt) + [1] * (len(completion) + 1)

    def _messages(self, unit: Unit) -> tuple[list[int], list[int]]:
        messages = unit.messages or []
        if not messages:
            return [], []
        try:
            if GENERATION.search(self.chat.get_chat_template()):
                ids, mask = self._marked(messages)
            else:
                ids, mask = self._by_difference(messages, unit.document)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"document {unit.document}: the tokenizer's chat template refuses it: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        if ids and ids[-1] != self.eos:
            # The end of the last turn is learned with it; what the template adds after it is not.
            ids, mask = [*ids, self.eos], [*mask, mask[-1]]
        return ids, mask

    def _marked(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        encoded = self.chat.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])

    def _by_difference(
        self, messages: list[dict[str, Any]], document: int
    ) -> tuple[list[int], list[int]]:
        """The mask under a template without {% generation %} marks.

        An assistant's turn is what rendering the chat up to and with it adds to the chat before it
        and the header of an assistant's turn.
        """
        whole = self._render(messages)
        turns = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._render(messages[:i], add_generation_prompt=True) if i else ""
            through = self._render(messages[: i + 1])
            if not (whole.startswith(through) and through.startswith(before)):
                raise DataError(
                    f"document {document}: the chat template renders turn {i} differently as the "
                    "chat goes on, so the assistant's part cannot be told: mark it in the template "
                    "with {% generation %} ... {% endgeneration %}"
                )
            turns.append((len(before), len(through)))
        encoding = self.backend.encode(whole, add_special_tokens=False)
        begins = np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)
        mask = np.zeros(len(begins), dtype=np.uint8)
        for begin, end in turns:
            mask |= (begins >= begin) & (begins < end)
        return encoding.ids, mask.tolist()

    def _render(self, messages: list[dict[str, Any]], **options: bool) -> str:
        return self.chat.apply_chat_template(messages, tokenize=False, **options)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # The fast variant leaves out offsets, which are most of an encoding's memory.
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


def _joined(parts: Iterable[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.asarray(ids, dtype=np.uint32) for ids in parts]
    return np.concatenate(arrays), np.array([len(a) for a in arrays], dtype=np.int64)
