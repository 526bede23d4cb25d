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


def padding_problem(sample: dict[str, Any]) -> tuple[str, str] | None:
    """(expected, found) where the sample's columns contradict its `padding`, else None."""
    padding = int(sample.get("padding", 0))
    if not padding:
        return None
    length = len(sample["tokens"])
    if padding >= length:
        return f"padding of fewer than {length} tokens", f"{padding}"
    begin, last = length - padding, int(sample["documents"][-1])
    if last != begin:
        return f"the padding's start {begin} as the last of documents", f"{last}"
    if "loss_mask" in sample and sample["loss_mask"][begin:].any():
        return f"a loss_mask of 0 from position {begin} on, where padding begins", "1"
    return None
