"""Inputs of packed sequences: documents that share a sequence do not attend to each other.

Teacher and student call the same function, so that the distributions of the cache and those of the
student are conditioned on the same context.

A sequence holds several documents. Positions restart at 0 where a document starts, and no
attention mask is given: transformers (4.53 and later) then derives from the restarts a mask that is
causal within each document, for eager and sdpa attention, with the layer's own sliding window. A
ready-made 4D mask would be simpler to reason about, but it replaces the windows of models such as
Gemma 2. Not every architecture takes part, so `check_isolation` asks the model itself, once, after
loading.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from megadistill.errors import ConfigError
from megadistill.models.documents_apart import DocumentsApart, calls_counted, runs_apart
from megadistill.models.packed_sequences import position_ids
from megadistill.models.probe_tokens import Probe

Pack = Literal["isolate", "concat"]


def forward_inputs(
    model: nn.Module,
    tokens_BT: torch.Tensor | np.ndarray,
    documents: Sequence[np.ndarray],
    *,
    pack: Pack = "isolate",
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Returns the inputs of `model` (a causal language model of transformers, or its base model).

    tokens_BT: token ids of any integer dtype. documents: each sequence's document starts.
    pack: "isolate" keeps documents apart; "concat" lets every position see all before it.

    With flash attention the sequences are laid end to end, [1, B*T], because its packed form exists
    for a batch of one only: bring what the model returns to [N, ...] with a reshape.

    Raises ConfigError for several documents of a model that carries a state from token to token: no
    mask keeps them apart, and `DocumentsApart` runs them one by one.
    """
    tokens_BT = torch.as_tensor(np.asarray(tokens_BT).astype(np.int64), device=device)
    batch, seq_len = tokens_BT.shape
    if pack == "isolate" and any(len(starts) > 1 for starts in documents):
        _check_stateless(model)
    if pack == "concat":
        documents = [np.zeros(1, np.int64)] * batch
    positions_BT = torch.as_tensor(
        np.stack([position_ids(starts, seq_len) for starts in documents]), device=device
    )
    if "flash" in str(getattr(model.config, "_attn_implementation", "")):
        tokens_BT, positions_BT = tokens_BT.reshape(1, -1), positions_BT.reshape(1, -1)
    return {
        "input_ids": tokens_BT,
        "position_ids": positions_BT,
        # A mask of ones, or a key-value cache, would switch the detection of documents off.
        "attention_mask": None,
        "use_cache": False,
    }


def _check_stateless(model: Any) -> None:
    if runs_apart(model, "isolate"):
        kind = model.config.get_text_config().model_type
        raise ConfigError(
            f"data.pack: isolate, but model_type {kind} carries a state from token to token: run "
            "its documents one by one, with megadistill.models.documents_apart.DocumentsApart"
        )


def _check_calls(model: Any, per_forward: list[dict[str, float]], *, name: str) -> None:
    """ConfigError where a module is called more often in some forward passes than in others."""
    for module, calls in per_forward[0].items() if per_forward else ():
        if any(each.get(module, 0) != calls for each in per_forward):
            raise ConfigError(
                f"data.pack: isolate, but {name} ({model.config.model_type}) carries a state from "
                f"token to token and calls {module} more often the longer a document is: ZeRO-3 "
                "ranks with other documents would wait for each other: set data.pack=concat"
            )


# Relative distance of hidden states that rounding may cause.
_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def check_isolation(
    model: Any, *, name: str, seq_len: int, vocab_size: int, device: torch.device | str = "cpu"
) -> None:
    """Raises ConfigError if `model` lets a document see the one before it in its sequence.

    model: anything that returns `last_hidden_state`; `name` is for the message. Compares a sequence
    of several documents of random tokens with each document alone, two forwards of seq_len tokens.
    A model that carries a state runs the documents apart, as it does in training; ConfigError where
    it calls a module more often for a longer document. Collective under ZeRO-3.
    """
    probe = Probe.of(seq_len=seq_len, vocab_size=vocab_size)
    was_training = model.training
    model.eval()
    per_forward: list[dict[str, float]] = []

    def output(tokens_BT: np.ndarray, documents: list[np.ndarray]) -> Any:
        if runs_apart(model, "isolate"):
            apart = DocumentsApart.of(tokens_BT, documents, device=device)
            with calls_counted(model) as calls:
                result = apart.run(model, lockstep=True)
            per_forward.append({module: n / len(apart.groups) for module, n in calls.items()})
            return result
        return model(**forward_inputs(model, tokens_BT, documents, device=device))

    alone_TH, packed_TH = (
        output(tokens_T[None], [starts]).last_hidden_state[0].float()
        for tokens_T, starts in (
            (probe.tokens_T, np.zeros(1, np.int64)),
            (probe.packed_T, probe.starts),
        )
    )
    model.train(was_training)
    _check_calls(model, per_forward, name=name)
    alone_TH = alone_TH[torch.from_numpy(probe.positions_T).to(alone_TH.device)]
    distance_T = (packed_TH - alone_TH).norm(dim=1) / alone_TH.norm(dim=1).clamp_min(1e-6)
    for number, quarter in enumerate(distance_T.tensor_split(4), 1):
        if len(quarter) and not quarter.mean() <= _ROUNDING[model.dtype]:
            config: Any = model.config
            raise ConfigError(
                f"data.pack: isolate, but in {name} ({config.model_type}, attention "
                f"{config._attn_implementation}) a document sees the one before it: hidden states "
                f"move by {float(quarter.mean()):.1%} in quarter {number} of {seq_len} random "
                "tokens: set data.pack=concat, or use another architecture"
            )
