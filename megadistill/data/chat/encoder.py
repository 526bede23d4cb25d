"""Chats to token ids and loss masks.

The ids are those of the rendered text, tokenised in one go. Only where a token would lie across the
border of what is learned (a generation prompt that ends with a line break before an answer that
begins with one) is the text tokenised in two parts there: the prompt then has the tokens that it
has at inference, and the model learns all that it generates. If two parts would decode to another
text (tokenizers that put a space before every text), the ids stay and the token is not learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadistill.data.chat import earlier
from megadistill.data.chat.boundaries import Boundaries, Chat, ChatError
from megadistill.data.chat.template import ChatTemplate, Messages, TemplateError, Tools
from megadistill.data.conversation import conversation
from megadistill.data.conversation import tools as read_tools
from megadistill.errors import BadDocumentError

EARLIER = "earlier"
# The columns' usual names, by the `data` key that names others.
_COLUMNS = {f"{name}_field": name for name in ("messages", "prompt", "completion", "tools")}


@dataclass(frozen=True)
class ChatSpec:
    """The settings that turn chats into text.

    templates: by name; `default`, and `tool_use` for chats with tools if the tokenizer has one.
    variables: the names that templates see besides the chat. date: that of `strftime_now`, ISO.
    mask: `generated`; `template` for its own {% generation %} marks; EARLIER for a store that was
    begun before there was a choice.
    """

    templates: dict[str, str]
    variables: dict[str, Any]
    date: str
    mask: str = "generated"


class ChatEncoder:
    """Made once in each tokenising process.

    backend: the tokenizers library's JSON. columns: the corpus' columns by `data` key, for
    messages.
    """

    def __init__(
        self, spec: ChatSpec, *, backend: str, eos: int, columns: Mapping[str, str] | None = None
    ) -> None:
        from tokenizers import Tokenizer

        self._columns = _COLUMNS | dict(columns or {})

        # The post-processor of byte-level tokenizers cuts white space off the offsets.
        whole = json.loads(backend) | {"truncation": None, "padding": None}
        parts = whole | {"post_processor": None}
        self._whole = Tokenizer.from_str(json.dumps(whole)) if spec.mask == EARLIER else None
        self._tokenizer = Tokenizer.from_str(json.dumps(parts))
        self._eos, self._eos_text = eos, self._tokenizer.id_to_token(eos) or ""
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special} | {self._eos_text}
        self._mask = spec.mask
        self._boundaries = {
            name: Boundaries(
                ChatTemplate(source, variables=spec.variables, date=spec.date), special
            )
            for name, source in spec.templates.items()
        }

    def encode(self, messages: Any, tools: Any = None) -> tuple[list[int], list[int]]:
        """(ids, mask) of a chat: every turn of the assistant is learned. BadDocumentError."""
        with self._column("messages_field"):
            if self._mask == EARLIER:
                template = self._boundaries["default"].template
                return earlier.encode(template, self._whole, messages, eos=self._eos)
            turns = conversation(messages)
        return self._encode(turns, self._tools(tools), [("messages_field", len(turns))], first=0)

    def encode_completion(
        self, prompt: Any, completion: Any, tools: Any = None
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of a prompt and a completion, each a list of turns or one turn's text.

        Only the assistant's turns of the completion are learned.
        """
        with self._column("prompt_field"):
            before = _turns(prompt, "user")
        with self._column("completion_field"):
            after = _turns(completion, "assistant")
        if not after:
            return [], []
        origin = [("prompt_field", len(before)), ("completion_field", len(after))]
        return self._encode(before + after, self._tools(tools), origin, first=len(before))

    def _tools(self, tools: Any) -> Tools:
        with self._column("tools_field"):
            return read_tools(tools)

    @contextmanager
    def _column(self, key: str) -> Iterator[None]:
        """Puts the column's name before what is said of a document."""
        try:
            yield
        except BadDocumentError as error:
            raise BadDocumentError(f"column {self._columns[key]!r}: {error}") from error

    def _where(self, turn: int, origin: list[tuple[str, int]]) -> str:
        """The column of a turn, and its number there."""
        for key, count in origin[:-1]:
            if turn < count:
                return f"column {self._columns[key]!r}: turn {turn}"
            turn -= count
        return f"column {self._columns[origin[-1][0]]!r}: turn {turn}"

    def _encode(
        self, messages: Messages, tools: Tools, origin: list[tuple[str, int]], *, first: int
    ) -> tuple[list[int], list[int]]:
        """origin: the `data` keys of the columns that hold the turns, and how many each holds."""
        if not messages:
            return [], []
        unlearned = {i for i, m in enumerate(messages) if m.get("weight") == 0}
        messages = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        name = "tool_use" if tools is not None and "tool_use" in self._boundaries else "default"
        boundaries = self._boundaries[name]
        refused: tuple[Messages, TemplateError] | None = None
        for shaped in _shapes(messages, boundaries.template):
            try:
                if _prints_null(shaped, boundaries.template, tools):
                    continue
                if self._mask == "template":
                    text, spans = boundaries.template.marked(shaped, tools)
                    begin = boundaries.begin(shaped, tools, first) if first else 0
                    spans = boundaries.without(spans, shaped, tools, unlearned)
                    return self._overlapping(text, [span for span in spans if span[0] >= begin])
                return self._within(
                    boundaries.find(shaped, tools, first=first, unlearned=unlearned)
                )
            except TemplateError as error:
                refused = refused or (shaped, error)
            except ChatError as error:
                raise BadDocumentError(f"{self._where(error.turn, origin)}: {error}") from error
        assert refused is not None
        shaped, reason = refused
        where = self._where(boundaries.refused_turn(shaped, tools), origin)
        raise BadDocumentError(f"{where}: the chat template refuses it: {reason}") from reason

    # Tokens

    def _within(self, chat: Chat) -> tuple[list[int], list[int]]:
        """Ids of the text, with a mask of the tokens inside what is learned."""
        ids, begins, ends = self._tokens(chat.text)
        borders = np.array([at for span in chat.learned for at in span], dtype=np.int64)
        after = np.searchsorted(begins, borders, side="left") - 1  # the last token before each
        across = (after >= 0) & (np.append(ends, 0)[after] > borders)
        if across.any():
            parts = self._parts(chat.text, sorted(set(borders[across].tolist())))
            if self._text(parts[0]) == self._text(ids):
                ids, begins, ends = parts
        mask = np.zeros(len(ids), dtype=np.uint8)
        for begin, end in chat.learned:
            mask |= (begins >= begin) & (ends <= end)
        return self._ended(chat.text, ids, mask, learn=chat.unclosed)

    def _overlapping(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """The mask of a template's own marks, as transformers makes it."""
        ids, begins, ends = self._tokens(text)
        mask = np.zeros(len(ids), dtype=np.uint8)
        for begin, end in spans:
            mask |= (begins < end) & (ends > begin)
        return self._ended(text, ids, mask, learn=len(mask) > 0 and bool(mask[-1]))

    def _ended(
        self, text: str, ids: np.ndarray, mask: np.ndarray, *, learn: bool
    ) -> tuple[list[int], list[int]]:
        """With an end token where the text lacks it. It is learned if the last turn was open."""
        if self._eos_text and text.rstrip().endswith(self._eos_text):
            return ids.tolist(), mask.tolist()
        return [*ids.tolist(), self._eos], [*mask.tolist(), int(learn)]

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, begin of each in characters, end of each)."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(encoding.ids, dtype=np.int64), offsets[:, 0], offsets[:, 1]

    def _parts(self, text: str, borders: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`_tokens` of the text cut at the borders."""
        found = []
        for begin, end in zip([0, *borders], [*borders, len(text)], strict=True):
            ids, begins, ends = self._tokens(text[begin:end])
            found.append((ids, begins + begin, ends + begin))
        ids, begins, ends = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return ids, begins, ends

    def _text(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def _turns(value: Any, role: str) -> Messages:
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    return conversation(value)


def _shapes(messages: Messages, template: ChatTemplate) -> Iterator[Messages]:
    """The chat in the forms that templates expect; the first one that is not refused counts.

    A content that is null is left out, as transformers 5 does, or null, or empty. A form that
    prints it as a word is passed over. Arguments of tool calls are objects, or JSON text.
    """
    messages = [_content(m, template) for m in messages]
    calls = any("tool_calls" in m for m in messages)
    nulls = any("content" not in m for m in messages)
    for as_text in (False, True) if calls else (False,):
        for null in ({}, {"content": None}, {"content": ""}) if nulls else ({},):
            yield [{**null, **(_with_text_arguments(m) if as_text else m)} for m in messages]


def _prints_null(messages: Messages, template: ChatTemplate, tools: Tools) -> bool:
    """Whether a content that is null or left out comes out as the word `null` or `None`."""
    if all(m.get("content") is not None for m in messages):
        return False
    text = template.render(messages, tools)
    try:
        empty = template.render([m | {"content": m.get("content") or ""} for m in messages], tools)
    except TemplateError:
        return False
    return any(text.count(word) > empty.count(word) for word in ("null", "None"))


def _content(message: dict[str, Any], template: ChatTemplate) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and not template.takes_parts:
        return message | {"content": "".join(part["text"] for part in content)}
    if isinstance(content, str) and not template.takes_text:
        return message | {"content": [{"type": "text", "text": content}]}
    return dict(message)


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append(call | {"function": function | {"arguments": text}})
    return message | {"tool_calls": calls}
