"""Chats as token stores without `assistant_mask` in their recipe were written.

Such a store continues as it began, and a complete one stays complete. The mask is that of the
template's {% generation %} marks; without marks, what a turn adds to the text of the chat before it
and the generation prompt. A document ends with the end token, learned if the token before it is.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from megadistill.data.chat.template import ChatTemplate, Messages, TemplateError, has_marks
from megadistill.errors import BadDocumentError


def encode(
    template: ChatTemplate, tokenizer: Any, value: Any, *, eos: int
) -> tuple[list[int], list[int]]:
    """(ids, mask) of a chat, with the whole tokenizer of the tokenizers library."""
    messages = _turns(value)
    if not messages:
        return [], []
    try:
        text, spans = _spans(template, messages)
    except TemplateError as error:
        raise BadDocumentError(f"the chat template refuses it: {error}") from error
    encoding = tokenizer.encode(text, add_special_tokens=False)
    mask = np.zeros(len(encoding.ids), dtype=np.uint8)
    begins = np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)
    for begin, end in spans:
        mask |= (begins >= begin) & (begins < end)
        if has_marks(template.source) and (first := encoding.char_to_token(begin)) is not None:
            mask[first] = 1  # transformers counts a token across the beginning
    ids, learned = list(encoding.ids), mask.tolist()
    if ids and ids[-1] != eos:
        ids, learned = [*ids, eos], [*learned, learned[-1]]
    return ids, learned


def _turns(value: Any) -> Messages:
    try:
        value = json.loads(value) if isinstance(value, str) else value or []
        turns = [json.loads(turn) if isinstance(turn, str) else turn for turn in value]
        turns = [{k: v for k, v in t.items() if v is not None or k == "content"} for t in turns]
    except (ValueError, TypeError, AttributeError) as error:
        raise BadDocumentError(
            f"expected a list of turns with role and content: {error}"
        ) from error
    wrong = next((i for i, turn in enumerate(turns) if "role" not in turn), None)
    if wrong is not None:
        raise BadDocumentError(
            f"turn {wrong}: expected role and content, found {', '.join(turns[wrong])}"
        )
    return turns


def _spans(template: ChatTemplate, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    if has_marks(template.source):
        return template.marked(messages)
    whole = template.render(messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:i], generation=True) if i else ""
        through = template.render(messages[: i + 1])
        if not (whole.startswith(through) and through.startswith(before)):
            raise BadDocumentError(
                f"turn {i}: the chat template renders it differently in a longer chat: make the "
                "token store anew, in another data.dir"
            )
        spans.append((len(before), len(through)))
    return whole, spans
