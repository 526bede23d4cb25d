"""Packed sequences of equal length: their segments, positions and labels.

Pure functions on numpy arrays. How documents become sequences: `best_fit` and `in_order`.

    tokens     [d0 d0 d0 d1 d1 d1 d1 eos eos]     two documents, and two tokens of padding
    documents  [0        3           7]           where each segment begins, padding last
    positions  [0  1  2  0  1  2  3  0   1]
    labels     [d0 d0 -  d1 d1 d1 -  -   -]       -: -100

T sequence length, D segments in one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORED = -100  # the label of a position without a target, as in transformers and torch


@dataclass(frozen=True)
class Sequence:
    """Row of a training batch.

    tokens     uint32 [T]
    documents  uint32 [D], rising, beginning with 0: where in `tokens` a document, a part of one,
               or the padding begins
    loss_mask  uint8 [T], 1: learn to predict this token; None: learn all of them
    padding    tokens of padding at the end: a last segment that belongs to no document. None: the
               store's sequences have no padding
    """

    tokens: np.ndarray
    documents: np.ndarray
    loss_mask: np.ndarray | None = None
    padding: int | None = None


def position_ids(documents: np.ndarray, seq_len: int) -> np.ndarray:
    """int64 [T]: each token's position within its document's segment, from 0."""
    starts = documents.astype(np.int64)
    lengths = np.diff(starts, append=seq_len)
    return np.arange(seq_len) - np.repeat(starts, lengths)


def sample_labels(sample: dict[str, Any], *, masked: bool = True) -> np.ndarray:
    """int64 [T]: `labels` of a sequence as a store returns it. masked: use its loss mask."""
    return labels(
        sample["tokens"],
        sample["documents"],
        sample.get("loss_mask") if masked else None,
        padding=int(sample.get("padding", 0)),
    )


def labels(
    tokens: np.ndarray,
    documents: np.ndarray,
    loss_mask: np.ndarray | None = None,
    *,
    padding: int = 0,
) -> np.ndarray:
    """int64 [T]: the token after each position, or -100 where there is none to learn.

    There is none at the last position, where the next token lies in another document, where the
    mask of the next token is 0, and in the `padding` tokens at the end.
    """
    result = np.empty(len(tokens), dtype=np.int64)
    result[:-1] = tokens[1:]
    result[-1] = IGNORED
    result[documents[1:].astype(np.int64) - 1] = IGNORED
    if loss_mask is not None:
        result[:-1][loss_mask[1:] == 0] = IGNORED
    result[len(tokens) - padding :] = IGNORED
    return result
