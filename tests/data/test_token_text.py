"""The text of single ids: readable, and nothing in it that a terminal acts on."""

from __future__ import annotations

from pathlib import Path

from megadistill.data.token_text import escaped, token_text
from tests.models.made import tiny_tokenizer


def test_what_a_terminal_acts_on_is_escaped() -> None:
    assert escaped("a b\n\t\x1b[31m\x00") == "a b\\n\\t\\x1b[31m\\x00"
    assert escaped("\u202e\u2028\xa0\x9b") == "\\u202e\\u2028\\xa0\\x9b"
    assert escaped("back\\slash") == "back\\\\slash"
    assert escaped("\u00e9\u4e2d\U0001f600") == "\u00e9\u4e2d\U0001f600"


def test_ids_become_text_and_pieces_of_characters_stay_as_they_are(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path))
    text = token_text(tokenizer)
    ids = tokenizer("def self.\n    return").input_ids
    assert "".join(map(text, ids)) == "def self.\n    return"
    piece = tokenizer("\u4e2d").input_ids[0]
    assert text(piece) == tokenizer.convert_ids_to_tokens(piece)
    assert text(0) == "<|end|>"
    assert text(100_000) == "<id 100000>"


def test_the_beginning_of_a_word_keeps_its_space() -> None:
    class SentencePiece:
        def convert_ids_to_tokens(self, token: int) -> str:
            return "\u2581word"

        def decode(self, ids: list[int], **_: object) -> str:
            return "word"

    assert token_text(SentencePiece())(1) == " word"
