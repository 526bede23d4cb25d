"""Runs each document of a micro-batch alone, for models that carry a state from token to token.

Recurrent layers, linear attention and short convolutions know no borders within a sequence: a mask
does not reset their state. Under `data.pack: isolate` teacher and student therefore run such a
model over the documents themselves. The documents of a micro-batch are sorted by length and
grouped. Each group is a batch of its own, padded on the right, at positions 0 to L-1 and without
an attention mask: what follows a token does not change it. The outputs are put back in the order
of the sequences.

Grouping is a function of the micro-batch alone, so a cache's bytes do not depend on the number of
ranks. A group's padded size is at most that of the micro-batch, B x T, so that a forward needs no
more memory than a packed one. A student keeps the activations of all groups until its backward
pass. Under ZeRO-3 all ranks run equally many forwards: each rank says how many it has, in an
all-reduce of one integer for each micro-batch, and those with fewer run forwards of one token whose
output is not used. (Each rank could count the others' groups itself, but only by reading their
sequences too.)

Cost: for log-normal documents with a median of 150 to 900 tokens, in micro-batches of 4 to 32
sequences of 2,048, 3 to 5 forwards over 1.16 to 1.41 times the tokens. Under ZeRO-3 each forward
gathers the weights again, and takes as long as the slowest rank's. `tools/bench.py apart` measures
1.02 to 1.25 times the seconds of the packed sequences on CPUs.

ZeRO-3 gathers weights when a module is called. A module that is called more often in a longer
document (Qwen4's indexer) would make ranks come to different collectives. So a teacher's decoder
layers are gathered as a whole, and a student that has such a module is refused: DeepSpeed takes a
single forward in a micro-batch of what it gathers as a whole.

Kernels that take the documents' boundaries (`cu_seq_lens_q`, `seq_idx`) would avoid the padding,
but the implementations that run without those kernels ignore the boundaries.

Shapes: B sequences, T positions, N = B*T, R rows of L positions in one forward, H hidden size,
E experts.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megadistill.models.layers import listed_layers

log = logging.getLogger(__name__)

# Layers that see earlier tokens otherwise than by attention under transformers' mask, as
# config.json names them in _LAYER_LISTS.
_STATE_LAYERS = frozenset(
    {
        "conv",
        "hybrid",
        "hybrid_sliding",
        "linear_attention",
        "mamba",
        "mamba2",
        "recurrent",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    }
)
_OTHER_LAYERS = frozenset(
    {"attention", "full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"}
)
_LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")

# Settings that only models with such layers have, where the layers are not listed.
_STATE_KEYS = (
    "state_size",
    "ssm_state_size",
    "mamba_d_state",
    "ssm_cfg",
    "lru_width",
    "rescale_every",
    "linear_conv_kernel_dim",
    "conv_L_cache",
    "linear_attn_config",
    "hybrid_override_pattern",
    "cca_time0",
    "return_last_states",
)

# One more forward is worth it where it saves an eighth of the micro-batch's size in padding.
_FORWARDS_A_LIMIT = 8


def carries_state(settings: Mapping[str, Any]) -> str | None:
    """Returns the setting that says that a model carries a state between tokens, or None.

    settings: of the whole model, or of its text model alone.
    """
    levels = [settings]
    if isinstance(settings.get("text_config"), Mapping):
        levels.insert(0, settings["text_config"])
    for level in levels:
        for name in _LAYER_LISTS:
            kinds = [str(kind) for kind in level.get(name) or ()]
            found = next((kind for kind in kinds if kind in _STATE_LAYERS), None)
            if found is not None:
                return f"{name}: {found}"
            # Granite 4 and LFM2 have models of the same kind without such a layer.
            if kinds and _OTHER_LAYERS.issuperset(kinds):
                return None
    keys = ((level, key) for level in levels for key in _STATE_KEYS)
    return next((key for level, key in keys if level.get(key) is not None), None)


def runs_apart(model: Any, pack: str) -> bool:
    """Whether the documents of a sequence are to be run apart. model: of transformers."""
    return pack == "isolate" and carries_state(vars(model.config.get_text_config())) is not None


def log_apart(model: Any, pack: str, *, key: str) -> None:
    """Logs one line if documents run apart. key: where the configuration names the model."""
    if runs_apart(model, pack):
        config = model.config.get_text_config()
        log.info(
            "%s: model_type %s carries a state from token to token (%s): the documents of a "
            "sequence run apart (data.pack: isolate)",
            key,
            config.model_type,
            carries_state(vars(config)),
        )


def gather_layers_together(model: nn.Module) -> None:
    """Has ZeRO-3 gather each layer as one module. Called before DeepSpeed's engine is made."""
    from deepspeed.utils import set_z3_leaf_module

    for layer in listed_layers(model):
        set_z3_leaf_module(layer, True)


@contextlib.contextmanager
def calls_counted(model: nn.Module) -> Iterator[Counter[str]]:
    """Yields how often each module that has parameters of its own is called inside, by name."""
    calls: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *_: calls.update([name])

    hooks = [
        module.register_forward_pre_hook(count(name))
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class DocumentsApart:
    """The documents of a micro-batch of [B, T] tokens, grouped by length.

    groups: token ids, int64 [R, L] each. order_N: for each position of the sequences its place in
    the groups' outputs laid end to end, int64.
    """

    groups: tuple[torch.Tensor, ...]
    order_N: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def of(
        cls,
        tokens_BT: torch.Tensor | np.ndarray,
        documents: Sequence[np.ndarray],
        *,
        device: torch.device | str = "cpu",
    ) -> DocumentsApart:
        """tokens_BT: ids of any integer dtype. documents: where each sequence's documents start."""
        tokens_BT = np.asarray(tokens_BT)
        B, T = tokens_BT.shape
        tokens_N = tokens_BT.astype(np.int64).reshape(-1)
        firsts = np.concatenate(
            [b * T + np.asarray(starts, np.int64) for b, starts in enumerate(documents)]
        )
        lengths = np.diff(firsts, append=B * T)
        groups, order_N, used = [], np.empty(B * T, np.int64), 0
        # After one token a state has decayed nowhere: RWKV's decay would have no gradient on this
        # rank, and DeepSpeed reduces the gradients of all ranks together.
        shortest = 2 if lengths.max() == 1 else 1
        for members in grouped_by_length(lengths, limit=B * T):
            R, L = len(members), max(int(lengths[members[-1]]), shortest)
            rows = np.repeat(np.arange(R), lengths[members])
            columns = np.concatenate([np.arange(length) for length in lengths[members]])
            places = firsts[members][rows] + columns
            ids_RL = np.zeros((R, L), np.int64)
            ids_RL[rows, columns] = tokens_N[places]
            order_N[places] = used + rows * L + columns
            groups.append(torch.from_numpy(ids_RL).to(device))
            used += R * L
        return cls(tuple(groups), torch.from_numpy(order_N).to(device), (B, T))

    def run(self, model: Any, *, lockstep: bool) -> Any:
        """`last_hidden_state` [B, T, H], and `router_logits`, [N, E] of each layer, or None.

        model: one that ends in hidden states. lockstep: run as many forwards as the rank that has
        the most, which is collective over all ranks; an accelerator is waited for.
        """
        groups = list(self.groups)
        if lockstep:
            missing = _most_of_all_ranks(len(groups), device=self.order_N.device) - len(groups)
            groups += [torch.zeros_like(groups[0][:1, :1])] * missing
        outputs = [model(input_ids=ids_RL, use_cache=False) for ids_RL in groups]
        # Forwards of padding lie at the end, where no position is taken from. They stay in the
        # graph, so that the backward pass is the same on all ranks, too.
        hidden_NH = self._packed([output.last_hidden_state.flatten(0, 1) for output in outputs])
        layers = [getattr(output, "router_logits", None) or () for output in outputs]
        routers = tuple(self._packed(list(each)) for each in zip(*layers, strict=True))
        return SimpleNamespace(
            last_hidden_state=hidden_NH.unflatten(0, self.shape), router_logits=routers or None
        )

    def _packed(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.flatten(0, -2) for part in parts]).index_select(0, self.order_N)


def grouped_by_length(lengths: np.ndarray, *, limit: int) -> list[np.ndarray]:
    """Indices into `lengths`, ascending by length, in groups of rows x longest <= limit.

    The groups with the least padding, where one more group counts as limit / 8 tokens of padding.
    limit: at least the sum of lengths.
    """
    order = np.argsort(lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    before = np.concatenate([[0], counts.cumsum()])  # documents shorter than each size
    costs, froms = np.zeros(len(sizes) + 1, np.int64), np.zeros(len(sizes) + 1, np.int64)
    for last in range(1, len(sizes) + 1):
        padded = (before[last] - before[:last]) * sizes[last - 1]
        cost = costs[:last] + _FORWARDS_A_LIMIT * padded + limit
        cost[padded > limit] = np.iinfo(np.int64).max
        froms[last] = cost.argmin()
        costs[last] = cost[froms[last]]
    groups, last = [], len(sizes)
    while last:
        first = int(froms[last])
        groups.append(order[before[first] : before[last]])
        last = first
    return groups[::-1]


def _most_of_all_ranks(count: int, *, device: torch.device) -> int:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
