"""Inputs of a transformers model for packed documents.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megadistill.api.arguments import Array, as_tensor, in_callers_words
from megadistill.errors import ArgumentError
from megadistill.models import attention
from megadistill.models.attention import Pack


def forward_inputs(
    model: torch.nn.Module,
    tokens_BT: Array,
    documents: Sequence[Array] | None = None,
    *,
    pack: Pack = "isolate",
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Return keyword arguments of a causal language model of transformers, or of its base model.

    tokens_BT  token ids, integers [B, T], a numpy array or a tensor
    documents  of each sequence the positions where its documents start, the first one 0; None: one
               document each
    pack       "isolate" keeps documents apart, "concat" lets a position see all before it: as
               `data.pack` was for the cache
    device     by default the model's

    Under flash attention the inputs are laid end to end, [1, B*T]. Raises ArgumentError (a
    ValueError) for arguments that do not fit, and for a model that cannot keep documents apart.
    """
    tokens = as_tensor("tokens_BT", tokens_BT)
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ArgumentError(
            f"tokens_BT is {tokens.dtype} {list(tokens.shape)}, expected integers [B, T]"
        )
    if pack not in ("isolate", "concat"):
        raise ArgumentError(f"pack is {pack!r}, expected 'isolate' or 'concat'")
    starts = [np.zeros(1, np.int64)] * len(tokens)
    if documents is not None:
        starts = [_starts(each, tokens.shape[1], row) for row, each in enumerate(documents)]
    if len(starts) != len(tokens):
        raise ArgumentError(
            f"documents has {len(starts)} elements, expected {len(tokens)}: one for each sequence"
        )
    where = device_of(model) if device is None else device
    with in_callers_words():
        return attention.forward_inputs(
            model, tokens.cpu().numpy(), starts, pack=pack, device=where
        )


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device of the model's parameters."""
    return next(model.parameters()).device


def _starts(value: Array, seq_len: int, row: int) -> np.ndarray:
    starts = as_tensor(f"documents[{row}]", value).cpu().numpy().astype(np.int64)
    rises = starts.ndim == 1 and len(starts) > 0 and starts[0] == 0 and (np.diff(starts) > 0).all()
    if not rises or starts[-1] >= seq_len:
        raise ArgumentError(
            f"documents[{row}] is {starts.tolist()!s:.80}, expected positions that rise from 0, "
            f"below {seq_len}"
        )
    return starts
