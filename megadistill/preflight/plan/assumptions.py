"""Assumptions where nothing is measured: bytes of text, tokens, entries and bytes of targets.

text         3.5 bytes a token at a vocabulary below 10,000 (measured: the standard library at
             4,096), 4.2 above
documents    1,000 tokens each where only their number is known (FineWeb-Edu: about 1,030)
entries      as the method estimates them, see targets/methods/
bytes        an entry and a position, with entropy and nll: fitted to the synthetic teacher at
             128,256 ids. The demo's 4,096 ids take two thirds of it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megadistill.targets import sparse_method

TOKENS_A_DOCUMENT = 1000
BYTES_A_SOURCE_FILE = 17_000  # of the standard library: 11.4 MB in 674 files


@dataclass(frozen=True)
class Position:
    """Entries and bytes of a position's targets, estimated and at most."""

    entries: float
    most_entries: float
    bytes: float
    most_bytes: float


def position(targets: Any, *, vocab_size: int | None) -> Position:
    """The estimate for the configuration's `targets` section."""
    method, limit = sparse_method(targets.method), vocab_size or 1 << 17
    values = method.read(targets)
    most = min(method.largest_entries(values), limit)
    entries = min(method.expected_entries(values), most)
    return Position(
        entries=entries,
        most_entries=most,
        bytes=method.bytes_per_position + method.bytes_an_entry * entries,
        most_bytes=method.largest_bytes(values, vocab_size=limit),
    )


def bytes_a_token_of_text(vocab_size: int | None) -> float:
    """Returns the bytes of UTF-8 text in a token, on the average."""
    return 3.5 if vocab_size is not None and vocab_size < 10_000 else 4.2


def token_store_bytes_a_sequence(seq_len: int, *, masked: bool) -> int:
    """Tokens, starts of documents, the loss mask where there is one, a checksum."""
    documents = 1 + seq_len // TOKENS_A_DOCUMENT
    return 4 * seq_len + 4 * documents + (seq_len if masked else 0) + 40
