"""Settings that tiny models of several architectures have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """model_type and settings of a tiny model, and how it has to be run."""

    model_type: str
    special: str
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"  # gpt-oss has its sinks in the eager one only
    experts: bool = False
    pack: str = "isolate"


GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEAD = {"head_dim": 8}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
# transformers 4 gives Qwen2-MoE, and 4 and 5 give gpt-oss, no mask that keeps documents apart.
QWEN2_MOE_PACK = "concat" if version("transformers").startswith("4.") else "isolate"
EXPERTS = {"num_experts_per_tok": 2}
