"""From a stream of tokens to sequences of equal length, and their positions and labels.

Pure functions on numpy arrays.

    stream     d0 d0 d0 d0 d0 | d1 d1 d1 | d2 d2 d2 d2 d2 d2 | ...      every document ends with eos
    sequences  [d0 d0 d0 d0] [d0 d1 d1 d1] [d2 d2 d2 d2] [d2 d2 ...     cut at every T-th token
    documents  [0]           [0 1]         [0]           [0 ...

A document that is cut goes on in the next sequence as a segment of its own, with positions from 0:
nothing is padded and nothing dropped, at the price of one cut document per sequence end.

T sequence length, D documents (segments) in one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = -100  # the label of a position without a target, as in transformers and torch


@dataclass(frozen=True)
class Sequence:
    """One row of a training batch.

    tokens     uint32 [T]
    documents  uint32 [D], rising, beginning with 0: where in `tokens` a document, or the rest of
               one, begins
    loss_mask  uint8 [T], 1: learn to predict this token; None: learn all of them
    """

    tokens: np.ndarray
    documents: np.ndarray
    loss_mask: np.ndarray | None = None


def pack(
    tokens: np.ndarray,
    starts: np.ndarray,
    *,
    seq_len: int,
    loss_mask: np.ndarray | None = None,
    isolate: bool = True,
) -> list[Sequence]:
    """Cut a stream of tokens into whole sequences; what is left at the end is the caller's.

    `starts`: rising positions in the stream at which documents begin. With `isolate` False the
    stream is one text (`data.pack: concat`): every sequence is one segment.
    """
    count = len(tokens) // seq_len
    edges = np.arange(count + 1) * seq_len
    bounds = np.searchsorted(starts, edges)
    sequences = []
    for s in range(count):
        inside = starts[bounds[s] : bounds[s + 1]] - edges[s] if isolate else starts[:0]
        if not len(inside) or inside[0] != 0:
            inside = np.concatenate([[0], inside])
        cut = slice(edges[s], edges[s + 1])
        sequences.append(
            Sequence(
                tokens[cut].astype(np.uint32, copy=False),
                inside.astype(np.uint32),
                None if loss_mask is None else loss_mask[cut].astype(np.uint8, copy=False),
            )
        )
    return sequences


def position_ids(documents: np.ndarray, seq_len: int) -> np.ndarray:
    """int64 [T]: each token's position within its document's segment, from 0."""
    starts = documents.astype(np.int64)
    lengths = np.diff(starts, append=seq_len)
    return np.arange(seq_len) - np.repeat(starts, lengths)


def labels(
    tokens: np.ndarray, documents: np.ndarray, loss_mask: np.ndarray | None = None
) -> np.ndarray:
    """int64 [T]: the token after each position, or -100 where there is none to learn.

    There is none at the last position, where the next token lies in another document, and where
    the mask of the next token is 0.
    """
    result = np.empty(len(tokens), dtype=np.int64)
    result[:-1] = tokens[1:]
    result[-1] = IGNORED
    result[documents[1:].astype(np.int64) - 1] = IGNORED
    if loss_mask is not None:
        result[:-1][loss_mask[1:] == 0] = IGNORED
    return result
