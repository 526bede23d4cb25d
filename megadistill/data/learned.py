"""Whether anything of a store is learned from: what its markers count, else its first sequences.

Stores of token sequences and caches alike. A run over a store without a single label has a loss of
0, no gradient, and ends with a model that learned nothing.
"""

from __future__ import annotations

import logging
from typing import Any

from megadistill.blocks import BlockReader
from megadistill.data.counts import count_tokens
from megadistill.errors import DataError
from megadistill.models.packed_sequences import IGNORED, sample_labels

log = logging.getLogger(__name__)

FEW = 0.01  # of all tokens; below it a warning


def require_learned(store: BlockReader, *, key: str) -> None:
    """DataError for a store without one label; a warning where less than 1 % of it is learned.

    key: where the configuration names the store, for messages.
    """
    learned, tokens = learned_tokens(store), count_tokens(store)
    # Counts are of tokens; the first of a document is no label. So one sequence has to be found.
    if learned == 0 or not any(has_labels(store[i]) for i in range(len(store))):
        raise DataError(nothing_learned(store, key=key))
    if learned is not None:
        warn_of_few(learned, tokens, name=store.name, key=key)


def warn_of_few(learned: int, tokens: int, *, name: str, key: str) -> None:
    """A line where less than 1 % of a store is learned from."""
    if learned < FEW * tokens:
        log.warning(
            "%s: %s: %d of %d tokens are learned from (%.2g %%): check the loss mask, the chat "
            "template and the columns of the data",
            key,
            name,
            learned,
            tokens,
            100 * learned / tokens,
        )


def nothing_learned(store: BlockReader, *, key: str) -> str:
    """The message for a store without a label."""
    return (
        f"{key}: {store.name}: there is nothing to learn, no token of {len(store)} sequence(s) is "
        "a label: chats need an assistant turn, prompts a completion, documents two tokens; check "
        "data.messages_field or data.completion_field, and tokenise into another data.dir"
    )


def learned_tokens(store: BlockReader) -> int | None:
    """Tokens that the loss mask keeps, from the markers; None where they do not count them."""
    total = 0
    for block in store.committed():
        found = store.marker(block)["statistics"].get("learned_tokens")
        if type(found) is not int:
            return None
        total += found
    return total


def has_labels(sample: dict[str, Any]) -> bool:
    """Whether a sequence has a position to learn from."""
    return bool((sample_labels(sample) != IGNORED).any())
