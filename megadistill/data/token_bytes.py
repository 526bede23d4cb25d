"""The bytes that every id of a tokenizer stands for, so that texts in two tokenizers compare.

Read from the vocabulary as the tokenizer's decoder reads it, and checked against that decoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from megadistill.errors import ConfigError

_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any, *, key: str, lost: bytes) -> list[bytes]:
    """The bytes of every id; none of a special token. Behind the last, those of an unknown id.

    An id without a token, and the unknown token (unless it has another part, as GPT-2's has), stand
    for a text that nobody knows: `lost`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(_refusal(key, tokenizer, f"a slow one, {type(tokenizer).__name__}"))
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    read = _reader(json.loads(backend.to_str())["decoder"])
    plain = {i: read(token) for token, i in vocabulary.items() if i not in added}
    if not _agrees(backend, plain):
        decoder = type(backend.decoder).__name__
        raise ConfigError(_refusal(key, tokenizer, f"one with another decoder, {decoder}"))
    texts = [lost] * (2 + max([*vocabulary.values(), *added, *tokenizer.all_special_ids]))
    for i, text in plain.items():
        texts[i] = text
    for i, token in added.items():
        texts[i] = token.content.encode()
    for i in special_ids(tokenizer):
        texts[i] = b""
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id):
        texts[tokenizer.unk_token_id] = lost
    return texts


def _refusal(key: str, tokenizer: Any, found: str) -> str:
    return (
        f"{key}: {getattr(tokenizer, 'name_or_path', '')}: a teacher with another tokenizer than "
        "the student's is aligned by the tokens' bytes: expected fast tokenizers, byte-level or of "
        f"SentencePiece's kind, found {found}: choose models that have such tokenizers, or one "
        "tokenizer for both"
    )


def special_ids(tokenizer: Any) -> list[int]:
    """The ids that stand for no text, rising."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return sorted({i for i, t in added.items() if t.special} | set(tokenizer.all_special_ids))


def _reader(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """How a decoder of the tokenizers library, as its JSON has it, reads a token's bytes."""
    steps: list[dict[str, Any]] = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    spaces = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
    spaces += [
        step["pattern"].get("String")
        for step in steps
        if step["type"] == "Replace" and step["content"] == " "
    ]

    def read(token: str) -> bytes:
        byte = _FALLBACK.fullmatch(token) if "ByteFallback" in kinds else None
        if byte:
            return bytes([int(byte[1], 16)])
        for space in spaces:
            token = token.replace(space, " ")
        return token.encode()

    return read


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: visible ones of Latin-1 as they are, others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    codes = [*visible, *range(0x100, 0x100 + len(others))]
    return {chr(code): byte for code, byte in zip(codes, visible + others, strict=True)}


_BYTES = _byte_characters()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()  # as the decoder does


def _agrees(backend: Tokenizer, plain: dict[int, bytes]) -> bool:
    """Whether the decoder makes the same of the vocabulary, but for parts of characters.

    Some decoders drop a space at the beginning.
    """
    tokens, texts = [], []
    for i, data in plain.items():
        try:
            texts.append(data.decode())
        except UnicodeDecodeError:
            continue
        tokens.append(backend.id_to_token(i))
    decoder = backend.decoder
    return decoder is not None and decoder.decode(tokens).lstrip(" ") == "".join(texts).lstrip(" ")


def plain_backend(tokenizer: Any) -> Tokenizer:
    """A copy of its own, that neither truncates nor pads, whatever the files or others ask for."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that it puts before a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    mask = [*encoding["special_tokens_mask"], 0]
    return encoding["input_ids"][: mask.index(0)]


def leading_spaces(backend: Tokenizer, texts: list[bytes], text: str) -> int:
    """With how many spaces the tokens of `text` begin: some tokenizers put one before it."""
    ids = backend.encode(text, add_special_tokens=False).ids
    data = b"".join(texts[i] for i in ids)
    return len(data) - len(data.lstrip(b" "))
