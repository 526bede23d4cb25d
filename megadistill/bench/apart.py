"""Forward passes with the documents apart, over passes of the same sequences as one document each.

For models that carry a state from token to token (`megadistill/models/documents_apart.py`).
Documents have log-normal lengths with a median of 300 tokens. forwards, tokens: passes of a
micro-batch, and the tokens in them with padding, over those of the sequences.

Found on two quiet cores, four sequences of 2,048, hidden size 256, 5 rounds (least and most): 4
passes over 1.31 times the tokens took 1.13 (1.02 to 1.16) times as long for Falcon-H1, 1.25 (1.21
to 1.45) for LFM2, and 1.02 (0.94 to 1.09) for Qwen3-Next, whose attention is over shorter rows.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megadistill.bench.rounds import ratio, take_turns
from megadistill.models.documents_apart import DocumentsApart

VOCAB = 1024
_STATE: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "qwen3_next": {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
    },
}


@dataclass(frozen=True)
class ApartSizes:
    """Sizes of a micro-batch and of a model of four layers."""

    sequences: int = 4
    seq_len: int = 2048
    hidden: int = 256


def apart_cost(sizes: ApartSizes, *, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each kind of model: how long the documents apart take, as a ratio."""
    generator = np.random.default_rng(0)
    B, T = sizes.sequences, sizes.seq_len
    tokens_BT = generator.integers(0, VOCAB, (B, T))
    documents = [_starts(generator, T) for _ in range(B)]
    apart = DocumentsApart.of(tokens_BT, documents)
    ids_BT = torch.from_numpy(tokens_BT)
    for model_type in _STATE:
        model = _model(model_type, sizes.hidden)

        def separately(model: Any = model) -> None:
            with torch.no_grad():
                apart.run(model, lockstep=False)

        def as_one(model: Any = model) -> None:
            with torch.no_grad():
                model(input_ids=ids_BT, use_cache=False)

        seconds = take_turns({"apart": separately, "as_one": as_one}, rounds=rounds)
        yield {
            "data": f"{model_type}, {B} sequences of {T:,}, hidden size {sizes.hidden}",
            "rounds": rounds,
            "forwards": len(apart.groups),
            "tokens": sum(ids.numel() for ids in apart.groups) / (B * T),
            **ratio(seconds["apart"], seconds["as_one"]),
        }


def _starts(generator: np.random.Generator, length: int) -> np.ndarray:
    ends = generator.lognormal(np.log(300), 1.0, length).astype(np.int64).clip(1).cumsum()
    return np.concatenate([[0], ends[ends < length]])


def _model(model_type: str, hidden: int) -> Any:
    from transformers import AutoConfig, AutoModel

    settings = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "pad_token_id": None,
        **_STATE[model_type],
    }
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(model_type, **settings)).eval()
