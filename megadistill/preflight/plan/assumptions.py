"""Assumptions where nothing is measured: bytes of text, tokens, entries and bytes of targets.

text         3.5 bytes a token at a vocabulary below 10,000 (measured: the standard library at
             4,096), 4.2 above
documents    1,000 tokens each where only their number is known (FineWeb-Edu: about 1,030)
varopt       2 / sqrt(tau) entries per token: a teacher of 2 nats mean entropy. Measured, as
             multiples of 1 / sqrt(tau) at tau = 0.06 (with tau between 0.02 and 0.2 they move by
             a sixth up to 2 nats, by half at 4.4):

                 entropy, nats   1.2   1.5*  1.6   2.1   3.2   4.4   4.8*
                 entries         1.3   1.5   1.6   1.9   2.6   3.2   3.4

             (the demo's teacher at temperatures 0.4 to 1, 2,048 held-out positions; * synthetic
             (-log(rank + 2.7) + 3 normal) / T at 32,000 ids, T in 0.25..0.75, and T = 1). So a
             sure teacher has two thirds of the estimate, an unsure one up to 1.7 times it; never
             more than ceil(1 / tau) + 1
multinomial  1.9 * sqrt(draws) different ids, the same teachers at 2 nats (1.2 to 4.1)
topp         1.7 / (1 - p) entries, and k at most: heavy tails make it the least certain of all
             (at p = 0.95 and k = 64: 20 at 1.6 nats, 29 at 2.1, 57 at 4.4)
topk         k entries, and the true id for every fifth position
bytes        an entry and a position, with entropy and nll: fitted to the synthetic teacher at
             128,256 ids. The demo's 4,096 ids take two thirds of it
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TOKENS_A_DOCUMENT = 1000
BYTES_A_SOURCE_FILE = 17_000  # of the standard library: 11.4 MB in 674 files


@dataclass(frozen=True)
class Assumed:
    """Assumptions about one method. Entries are functions of the `targets` section."""

    entries: Callable[[Any], float]
    most: Callable[[Any], float]
    bytes_an_entry: float  # what the codec takes, ids and weights together, at 128,000 ids
    bytes_per_position: float  # and besides: counts, what is left over, streams, entropy, nll


METHODS = {
    "varopt": Assumed(lambda t: 2 / math.sqrt(t.tau), lambda t: math.ceil(1 / t.tau) + 1, 1.8, 2.2),
    "multinomial": Assumed(lambda t: 1.9 * math.sqrt(t.draws), lambda t: t.draws, 1.8, 2.0),
    "topk": Assumed(lambda t: t.k + 0.2, lambda t: t.k + 1, 2.1, 4.4),
    "topp": Assumed(
        lambda t: 1.7 / (1 - t.p) + 0.2 if t.p < 1 else math.inf, lambda t: t.k + 1, 2.1, 4.0
    ),
}


@dataclass(frozen=True)
class Position:
    """Entries and bytes of a position's targets, estimated and at most."""

    entries: float
    most_entries: float
    bytes: float
    most_bytes: float


def position(targets: Any, *, vocab_size: int | None) -> Position:
    """The estimate for the configuration's `targets` section."""
    assumed, limit = METHODS[targets.method], vocab_size or 1 << 17
    most = min(assumed.most(targets), limit)
    entries = min(assumed.entries(targets), most)
    an_id = 2 if limit <= 1 << 16 else 3 if limit <= 1 << 24 else 4
    return Position(
        entries=entries,
        most_entries=most,
        bytes=assumed.bytes_per_position + assumed.bytes_an_entry * entries,
        most_bytes=8 + most * (an_id + 4),
    )


def bytes_a_token_of_text(vocab_size: int | None) -> float:
    """Returns the bytes of UTF-8 text in a token, on the average."""
    return 3.5 if vocab_size is not None and vocab_size < 10_000 else 4.2


def token_store_bytes_a_sequence(seq_len: int, *, masked: bool) -> int:
    """Tokens, starts of documents, the loss mask where there is one, a checksum."""
    documents = 1 + seq_len // TOKENS_A_DOCUMENT
    return 4 * seq_len + 4 * documents + (seq_len if masked else 0) + 40
