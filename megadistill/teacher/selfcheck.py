"""What the engine and our head say, held against what the model itself says, before a run starts.

AutoTP goes by the names of layers. Most architectures come out right, some fail in the first
forward (norms over all heads at once, fused projections), and one whose layers are called
otherwise would be sharded wrongly and answer all the same. Our head knows a linear projection with
bias, scale and soft-cap, and an architecture may do more to its logits. Both show in one probe.

What the engine is compared with:

tp > 1   the whole model's log-probabilities, computed by each rank before it is sharded. That needs
         what loading needs as well, the model in host memory, and one forward of 32 tokens on CPU.
tp = 1   (and `zero3`, where no rank holds the model) the backbone's modules are the model's own, at
         most gathered a layer at a time, and nothing can be sharded wrongly. What is checked is the
         head: the model's own way from hidden states to logits, with the weight our head has.

A teacher too large for a host's memory is loaded by `zero3` alone, so this is all there is to
compare; a loader that fills shards from files would have to compare with a pass under `zero3`.

Shapes: B sequences, T positions, N = B*T, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megadistill.attention import forward_inputs
from megadistill.errors import TeacherError
from megadistill.parallel import Mesh
from megadistill.teacher.head import TeacherHead

# nats: mean KL of what the model says to what the engine says. Rounding logits of 32 to bfloat16
# gives 7e-4, to float16 1e-5; a soft-cap or a window left out more than 0.1.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

ADVICE = "use teacher.engine=zero3 with teacher.tp=1, which runs the model's own modules"


def probe(vocab_size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """(tokens [2, 16], document starts): ids spread over the vocabulary, equal on every rank."""
    tokens_BT = (np.arange(32) * 7919 + 1) % vocab_size
    return tokens_BT.reshape(2, 16), [np.zeros(1, np.int64)] * 2


@torch.no_grad()
def own_log_probs(
    model: Any, *, vocab_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """float32 [N, V]: what `model`, a causal language model of transformers, says of the probe.

    vocab_size: ids that take part; V is that, or the rows of the model's head if these are fewer.
    """
    vocab_size = min(vocab_size, model.get_output_embeddings().out_features)
    tokens_BT, documents = probe(vocab_size)
    attention = str(model.config._attn_implementation)
    on_cpu_with_flash = "flash" in attention and torch.device(device).type == "cpu"
    if on_cpu_with_flash:  # it exists on GPUs only
        model.set_attn_implementation("sdpa")
    logits = model(**forward_inputs(model, tokens_BT, documents, device=device)).logits
    if on_cpu_with_flash:
        model.set_attn_implementation(attention)
    return torch.log_softmax(logits.flatten(0, -2)[:, :vocab_size].float(), -1)


def own_log_probs_of(model: Any, head: TeacherHead, *, device: torch.device) -> torch.Tensor:
    """`own_log_probs` of a model that an engine holds; `head` has the whole weight. Collective."""
    own = model.get_output_embeddings()
    linear = nn.Linear(1, 1, bias=head.bias_V is not None, device="meta")
    linear.out_features = len(head.weight_VH)
    linear.weight = nn.Parameter(head.weight_VH, requires_grad=False)
    if head.bias_V is not None:
        linear.bias = nn.Parameter(head.bias_V, requires_grad=False)
    model.set_output_embeddings(linear)
    try:
        return own_log_probs(model, vocab_size=len(head.weight_VH), device=device)
    finally:
        model.set_output_embeddings(own)


@contextlib.contextmanager
def named(model: Any, mesh: Mesh) -> Iterator[None]:
    """What sharding `model` dies of, as a TeacherError that names the architecture.

    Where it is sharded: at tp = 1 there is no AutoTP to blame, and an error goes its way.
    """
    if mesh.tp == 1:
        yield
        return
    try:
        yield
    except (torch.OutOfMemoryError, dist.DistError):
        raise
    except (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError,
            TypeError, ValueError) as error:  # fmt: skip
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TeacherError(
            f"teacher.tp: {mesh.tp}: DeepSpeed's AutoTP cannot shard {_name(model)} "
            f"({lines[0]}): {ADVICE}"
        ) from error


def compare(model: Any, own_NV: torch.Tensor, ours_NV: torch.Tensor, mesh: Mesh) -> None:
    """TeacherError where the engine's log-probabilities are not the model's. Collective over tp.

    own_NV: of the whole vocabulary; ours_NV: this rank's slice of it.
    """
    V, columns = own_NV.shape[1], ours_NV.shape[1]
    first = V * mesh.tp_rank // mesh.tp if columns < V else 0
    own_NV = own_NV[:, first : first + columns].to(ours_NV.device, torch.float64)
    difference_NV = ours_NV.double() - own_NV
    # p * (expm1(d) - d) is positive term by term, so rounding of the sums does not show.
    kl = (own_NV.exp() * (difference_NV.expm1() - difference_NV)).sum() / len(own_NV)
    if columns < V:
        dist.all_reduce(kl, group=mesh.tp_group)
    tolerance = TOLERANCE[model.dtype]
    if not kl <= tolerance:  # also where it is not a number
        engine = f"teacher.tp: {mesh.tp}" if mesh.tp > 1 else "teacher.model"
        way_out = ADVICE if mesh.tp > 1 else (
            "heads that are known are linear, with logit_scale, logits_scaling or "
            "final_logit_softcapping in config.json"
        )  # fmt: skip
        raise TeacherError(
            f"{engine}: {_name(model)} under DeepSpeed says something else than the model itself: "
            f"on a probe of {len(own_NV)} tokens KL {float(kl):.2g} nats, expected at most "
            f"{tolerance:.0e}: {way_out}"
        )


def _name(model: Any) -> str:
    return f"{type(model).__name__} ({model.config.model_type})"
