"""The text of single token ids, fit for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any


def token_text(tokenizer: Any) -> Callable[[int], str]:
    """id -> its text by a transformers tokenizer; an id that it does not know is <id 7>.

    A piece of a character, which is no text by itself, is shown as the vocabulary writes it.
    """

    def text(token: int) -> str:
        try:
            piece = tokenizer.convert_ids_to_tokens(token)
        except (IndexError, OverflowError):
            piece = None
        if piece is None:
            return f"<id {token}>"
        found = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if "\ufffd" in found or not found:
            return piece
        # SentencePiece marks a word's beginning, and decoding drops it at the beginning of a text.
        return f" {found}" if piece.startswith("\u2581") and found[0] != " " else found

    return text


def escaped(text: str) -> str:
    r"""`text` without what a terminal would act on: control characters as \n, \x1b, \u202e."""
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    # C: control, format, surrogate, private, unassigned; Z: spaces and line ends of all kinds.
    acts = unicodedata.category(character)[0] in "CZ" and character != " "
    return character.encode("unicode_escape").decode() if acts or character == "\\" else character
