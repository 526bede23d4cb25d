"""Bytes of a teacher's weights that one rank holds, counted from the headers of its files.

tensor_parallel  AutoTP cuts the linear layers within decoder layers, and
                 `teacher/expert_sharding.py` the experts; embeddings, norms, routers and the biases
                 of layers that end in an all-reduce are whole on every rank. Beside them lies the
                 rank's slice of the head, also where the head is tied to the embedding
zero3            each tensor of the backbone is spread over all ranks. The head is whole on every
                 rank

Buffers are left out: rotary frequencies are a few kB.
"""

from __future__ import annotations

import re

from megadistill.config import Config
from megadistill.models.checkpoint_files import TensorHeader
from megadistill.models.model_files import ModelFiles
from megadistill.targets import find_method

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}

_LAYER = re.compile(r"\.?(?:layers|h|blocks?)\.(\d+)\.")
_HEADS = ("lm_head.weight", "embed_out.weight")
# The last module or parameter of a name that AutoTP leaves whole.
_WHOLE = re.compile(
    r"(?:^|\.)(?:[\w.]*norm\w*|ln_\w+|gate|router|wg|shared_expert_gate|q_a_proj"
    r"|kv_a_proj_with_mqa|conv1d|[A-Za-z_]*scale)\.(?:[\w.]+)$"
)
_ADDED_UP = re.compile(r"(?:o_proj|out_proj|down_proj|dense|dense_4h_to_h|fc2|w2)(?:\.|_)bias$")


def tensor_parallel_bytes(config: Config, files: ModelFiles) -> int | None:
    """Bytes of the first rank of a tensor-parallel group; None where the headers are not here."""
    found = _used(files)
    if found is None:
        return None
    tp, (body, head) = config.teacher.tp, found
    values = sum(
        -(-tensor.elements // tp) if _is_cut(name, tensor) else tensor.elements
        for name, tensor in body.items()
    )
    # Whole distributions are made on each rank by itself.
    online = config.teacher.mode == "online" and find_method(config.targets.method).whole_head
    return (values + (head if online else -(-head // tp))) * WIDTH[config.teacher.dtype]


def zero3_bytes(config: Config, files: ModelFiles, world: int) -> tuple[int, int] | None:
    """(bytes of a rank between forwards, of which offloading takes to the host)."""
    found = _used(files)
    if found is None:
        return None
    width, (body, head) = WIDTH[config.teacher.dtype], found
    spread = sum(-(-tensor.elements // world) for tensor in body.values())
    return (spread + head) * width, spread * width


def at_work_bytes(config: Config, files: ModelFiles) -> int | None:
    """Returns the bytes that ZeRO-3 gathers at a time: two layers, or a larger embedding."""
    found = _used(files)
    if found is None:
        return None
    layers: dict[str, int] = {}
    largest = 0
    for name, tensor in found[0].items():
        layer = _LAYER.search(name)
        if layer is None:
            largest = max(largest, tensor.elements)
        else:
            layers[layer.group()] = layers.get(layer.group(), 0) + tensor.elements
    return max(largest, 2 * max(layers.values(), default=0)) * WIDTH[config.teacher.dtype]


def _used(files: ModelFiles) -> tuple[dict[str, TensorHeader], int] | None:
    """The tensors of the backbone, and the values of the head."""
    tensors = files.tensors()
    if tensors is None or not files.layers:
        return None
    head = next((t for name, t in tensors.items() if name.endswith(_HEADS)), None)
    tied = files.get("tie_word_embeddings")
    body = {
        name: tensor
        for name, tensor in tensors.items()
        # Layers beyond the last are for multi-token prediction, and are not loaded.
        if not name.endswith(_HEADS) and (_layer(name) or 0) < files.layers
    }
    if head is None or tied:
        rows = files.vocab_size or 0
        embeddings = [t for name, t in body.items() if _layer(name) is None and t.shape[0] >= rows]
        head = max(embeddings, key=lambda t: t.elements, default=None)
    return body, 0 if head is None else head.elements


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return None if found is None else int(found.group(1))


def _is_cut(name: str, tensor: TensorHeader) -> bool:
    """Whether each rank of a tensor-parallel group keeps a part of it."""
    if _layer(name) is None or _ADDED_UP.search(name):
        return False
    if ".experts." in name:
        return True
    if _WHOLE.search(name):
        return False
    linear = name.endswith(".weight") and len(tensor.shape) == 2
    return linear or name.endswith((".bias", ".sinks"))
