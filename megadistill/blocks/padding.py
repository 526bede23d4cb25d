"""Padding at the end of a sequence: a segment of its own that belongs to no document.

A store with the feature `padding` counts it in the column `padding` (uint64, tokens). The last
entry of `documents` is where the padding begins, so attention treats it as a document that no other
position sees. Padding has no label, no target and a loss mask of 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def without_padding(sample: dict[str, Any]) -> np.ndarray:
    """The sample's tokens, up to where its padding begins."""
    tokens = sample["tokens"]
    return tokens[: len(tokens) - int(sample.get("padding", 0))]


def padding_problem(sample: dict[str, Any]) -> str | None:
    """Returns what contradicts the sample's `padding`, or None. Compares three columns."""
    padding, length = int(sample.get("padding", 0)), len(sample["tokens"])
    if not padding:
        return None
    if padding >= length:
        return f"padding: expected fewer than {length} tokens, found {padding}"
    begin, last = length - padding, int(sample["documents"][-1])
    if last != begin:
        return f"documents: expected the padding's start {begin} as the last one, found {last}"
    if "loss_mask" in sample and sample["loss_mask"][begin:].any():
        return f"loss_mask: expected 0 from position {begin} on, where padding begins, found 1"
    return None
