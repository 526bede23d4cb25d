"""Tokenizers of several kinds, and aligned positions found by a search through all pairs."""

from __future__ import annotations

import json
import random
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megadistill.data.alignment import Aligned, Alignment

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "it",
    "rains",
    "(x)",
    "Stra\u00dfe",
    "na\u00efve",
    "\u4f60\u597d",
    "\u4e16\u754c",
    "\U0001f600",
    "e\u0301",
    "12345",
    "\U0001f468\u200d\U0001f469",
    "\u043f\u0440\u0438\u0432\u0435\u0442",
    "\t",
    "\n",
    "\n\n",
    " ",
    "   ",
    "<s>",
    "</s>",
]
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
CONTINUATION = "".join(map(chr, range(0xDC80, 0xDCC0)))
PARTS = "".join(map(chr, range(0xDC80, 0xDD00)))
BEGIN, END, TURN = "<s>", "</s>", "<|turn|>"


def text(seed: int, words: list[str] = WORDS, count: int = 12) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(words) + draw.choice([" ", " ", ""]) for _ in range(count))


def plain(seed: int, count: int = 12) -> str:
    return " ".join(random.Random(seed).choices(WORDS[:11], k=count))


def fast(backend: Tokenizer, *, begin: bool, **more: Any) -> PreTrainedTokenizerFast:
    """With the special tokens, and the begin token before every text where `begin`."""
    backend.add_special_tokens([BEGIN, END, TURN])
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, backend.token_to_id(BEGIN))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BEGIN, eos_token=END, **more)


@cache
def byte_level(size: int = 400, begin: bool = False, split: bool = True) -> PreTrainedTokenizerFast:
    """As GPT-2's, Llama 3's and Qwen's. Without `split` tokens reach over the ends of words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text(s, WORDS[:-2]) for s in range(1000, 1300)], trainer)
    return fast(backend, begin=begin)


@cache
def metaspace(
    begin: bool = True, scheme: str = "legacy", fallback: bool = True
) -> PreTrainedTokenizerFast:
    """As Llama 2's (legacy), Mistral's (first) and Gemma's (never): few characters, and bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    prepend = [normalizers.Prepend("\u2581")] if scheme == "legacy" else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    words = [w for s in range(300) for w in plain(s).replace(" ", " \u2581").split()]
    backend.train_from_iterator([*words, "\u4f60\u597d"], trainer)
    settings = json.loads(backend.to_str())
    vocabulary = settings["model"]["vocab"]
    if fallback:
        for byte in range(256):
            vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
        settings["model"]["byte_fallback"] = True
    backend = Tokenizer.from_str(json.dumps(settings))
    if scheme == "first":
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return fast(backend, begin=begin, unk_token="<unk>")


@cache
def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([plain(s) for s in range(300)], trainer)
    return fast(backend, begin=False, unk_token="<unk>")


def encoded(tokenizer: Any, document: str) -> list[int]:
    """A document as a token store has it."""
    ids = plain_ids(tokenizer, document)
    begin = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return [tokenizer.bos_token_id] * begin + ids + [tokenizer.eos_token_id]


def plain_ids(tokenizer: Any, document: str) -> list[int]:
    """Special tokens that stand in a text as characters are characters."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return backend.encode(document, add_special_tokens=False).ids


def align(student: Any, teacher: Any, *rows: list[list[int]]) -> Aligned:
    """Rows of pieces. rows_N is checked: as many positions, none beyond the teacher's."""
    T = sum(map(len, rows[0]))
    tokens = np.array([list(chain(*row)) for row in rows], np.uint32)
    starts = [np.cumsum([0, *map(len, row[:-1])]).astype(np.uint32) for row in rows]
    aligned = Alignment(student, teacher).align(tokens, starts)
    assert aligned.rows_N.shape == (len(rows) * T,)
    assert aligned.rows_N.max() < aligned.tokens_BU.size
    return aligned


def read(tokenizer: Any, ids: list[int], *, fresh: tuple[bool, bool], begins: bool) -> str:
    """Text that has been read, the markers as characters (of the begin token only if `begins`).

    fresh: whether a space at the beginning, and behind a begin token, is the tokenizer's own.
    """
    result, run, own = "", [], fresh[0]
    marks = {tokenizer.bos_token_id: "\x02" * begins, tokenizer.eos_token_id: "\x03"}
    for i in [*ids, tokenizer.eos_token_id]:
        if i not in marks:
            run.append(tokenizer.convert_ids_to_tokens(i))
            continue
        found = joined(tokenizer, run)
        result += (found.removeprefix(" ") if own and spaced(tokenizer) else found) + marks[i]
        run, own = [], fresh[1] and i == tokenizer.bos_token_id
    return result[:-1]


def joined(tokenizer: Any, tokens: list[str]) -> str:
    """The tokens' text; each byte of a part of a character is a surrogate."""
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        data = bytes(BYTES[character] for token in tokens for character in token)
    else:
        data = b"".join(
            bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.replace("\u2581", " ").encode()
            for t in tokens
        )
    return data.decode(errors="surrogateescape")


def spaced(tokenizer: Any) -> bool:
    """Whether it puts a space before a text."""
    return tokenizer.tokenize("a")[0].startswith("\u2581")


def by_search(student: Any, teacher: Any, pieces: list[list[int]], aligned: Aligned) -> list[int]:
    """rows_N of a batch of one row, by comparing what either has read at every position."""
    begins = all(t("a").input_ids[0] == t.bos_token_id for t in (student, teacher))
    tokens = aligned.tokens_BU[0].tolist()
    edges = [*aligned.documents[0].tolist(), len(tokens)]
    rows = []
    for n, ids in enumerate(pieces):
        said = [uncut(t) for t in readings(student, ids, fresh=(n > 0, True), begins=begins)]
        theirs = tokens[edges[n] : edges[n + 1]]
        both = [readings(teacher, theirs, fresh=(x, x), begins=begins) for x in (True, False)]
        # Some put no space before a text that begins with one.
        whole = readings(student, ids, fresh=(n > 0, True), begins=begins)[-1].strip(PARTS)
        heard = both[1] if both[1] and both[1][-1] == whole else both[0]
        for text in said:
            found = [j for j, other in enumerate(heard) if other == text]
            rows.append(edges[n] + found[-1] if found else -1)
    return rows


def uncut(text: str) -> str | None:
    """Without the rest of a character at the beginning; None where nothing else is there."""
    rest = text.lstrip(CONTINUATION)
    return None if text and not rest else rest


def readings(tokenizer: Any, ids: list[int], **how: Any) -> list[str]:
    return [read(tokenizer, ids[: i + 1], **how) for i in range(len(ids))]


def cut_row(student: Any, seed: int) -> list[list[int]]:
    """Documents one after the other, cut at two random tokens: pieces of one sequence."""
    draw = random.Random(seed)
    documents = [encoded(student, text(seed * 7 + n, count=draw.randint(1, 9))) for n in range(4)]
    documents[0] = documents[0][draw.randrange(len(documents[0]) - 1) :]
    documents[-1] = documents[-1][: draw.randint(2, len(documents[-1]))]
    return documents


PAIRS = {
    "two byte-level": lambda: (byte_level(400), byte_level(700)),
    "words and no words": lambda: (byte_level(600, split=False), byte_level(500, begin=True)),
    "begin tokens on both sides": lambda: (
        byte_level(600, begin=True),
        byte_level(300, begin=True),
    ),
    "a student of Llama 2's kind": lambda: (metaspace(), byte_level(600)),
    "a teacher of Llama 2's kind": lambda: (byte_level(600), metaspace()),
    "Mistral's kind": lambda: (metaspace(scheme="first"), byte_level(400, begin=True)),
    "a teacher of Mistral's kind": lambda: (byte_level(400, begin=True), metaspace(scheme="first")),
    "both of Llama 2's kind": lambda: (metaspace(), metaspace()),
    "Gemma's kind": lambda: (metaspace(scheme="never"), metaspace()),
}
