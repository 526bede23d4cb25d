"""Rows of the student's vocabulary that stand for no token: padding, which the export leaves out.

A vocabulary is often rounded up, so that a student may have more rows than the cache has ids. Above
them no token ever stands: training, the check of the head and evaluation leave these rows out of
the softmax. Left in the exported model they would be given probability by whatever softmax is next,
since nothing has trained their logits, and ids without a token could be generated. So the export
has the data's ids and no more, as converters of Megatron's checkpoints do it: what is loaded from
it is the model that was trained and evaluated. With a cache its rows are then the teacher's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megadistill.student.model import Student

State = dict[str, torch.Tensor]


@contextlib.contextmanager
def without_padding(
    student: Student, state: State, *, special: Sequence[int] = ()
) -> Iterator[State]:
    """Yields `state`, a whole model's, without padding. Inside, the configuration agrees.

    A special token among the padding keeps the rows up to it. The model's configuration may name
    it, or `special` (the generation settings that are exported with the model).
    """
    model, head = student.model, student.head
    rows = int(getattr(head.weight, "ds_shape", head.weight.shape)[0])
    kept = min(
        rows,
        max(
            head.vocab_size or rows, 1 + _highest_special(model), *(1 + token for token in special)
        ),
    )
    if kept == rows:
        yield state
        return
    table = model.get_input_embeddings()
    table_name = next(name for name, module in model.named_modules() if module is table)
    names = {f"{table_name}.weight", f"{student.head_name}.weight", f"{student.head_name}.bias"}
    cut = {
        name: value[:kept].clone()
        for name, value in state.items()
        if name in names and len(value) == rows
    }
    settings = model.config.get_text_config()
    before, settings.vocab_size = settings.vocab_size, kept
    try:
        yield state | cut
    finally:
        settings.vocab_size = before


def _highest_special(model: Any) -> int:
    """Returns the largest id that the model's settings name; -1 without any."""
    found = [-1]
    for settings in (model.config, model.config.get_text_config(), model.generation_config):
        for kind in ("bos", "eos", "pad"):
            ids = getattr(settings, f"{kind}_token_id", None)
            found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return max(found)
