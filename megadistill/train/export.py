"""The trained student as a folder that transformers loads: weights, tokenizer, model card.

Parameters are gathered one at a time and copied into a file that rank 0 has mapped, so that neither
an accelerator nor the host's memory ever holds the whole model; from there they are written as
safetensors. On the disk the model takes twice its size until then. The folder is written under
another name and renamed when complete.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megadistill.config import Config
from megadistill.config.curves import format_schedule, values
from megadistill.data.names import shown_name
from megadistill.errors import ConfigError
from megadistill.models.host_memory import return_freed_memory
from megadistill.models.model_files import has_tokenizer, tokenizer_source
from megadistill.parallel import Mesh
from megadistill.storage.files import LOCAL
from megadistill.student.model import Student
from megadistill.targets import divergence_name
from megadistill.train.own_files import GENERATION, special_ids
from megadistill.train.vocabulary_padding import without_padding

log = logging.getLogger(__name__)

SHARD_SIZE = "5GB"  # what the hub takes without a complaint
_ALIGNMENT = 64  # bytes

CARD = """---
library_name: transformers
tags: [distillation, megadistill]
---

# {name}

A causal language model trained with megadistill {version}.

- student: `{student}`, started from {init}
- learned from: {learned}
- loss: {loss}
- steps: {steps}, of {batch} sequences of {seq_len} tokens
{metrics}"""


def gathered(student: Student, mesh: Mesh, *, file: Path | None = None) -> dict[str, torch.Tensor]:
    """Returns the model's parameters and buffers on rank 0, {} on other ranks. Collective.

    file: the mapped file that holds the parameters on rank 0; default: host memory. Raises
    StoreError on all ranks if the disk is too small for it.
    """
    import deepspeed

    places = _Places(student, file)
    if file is not None:
        mesh.run_on_rank0(places.allocate)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in student.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if mesh.rank == 0:
                state[name] = places.copy(name, parameter.detach())
    if mesh.rank == 0:
        # Tied weights go by one of their names; buffers that are not saved stay out.
        saved = student.model.state_dict(keep_vars=True).keys()
        state |= {n: b.cpu() for n, b in student.model.named_buffers() if n in saved}
    return state


class _Places:
    """Where each parameter goes: one file after another of its bytes, or memory of its own."""

    def __init__(self, student: Student, file: Path | None) -> None:
        self._file, self._size = file, 0
        self._starts: dict[str, int] = {}
        for name, p in student.model.named_parameters():
            self._starts[name] = self._size
            size = getattr(p, "ds_numel", p.numel()) * p.element_size()
            self._size += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._mapped: mmap.mmap | None = None

    def allocate(self) -> None:
        """Reserves the space on disk: writing to a mapped file on a full disk kills the process."""
        assert self._file is not None
        LOCAL.allocate(self._file, self._size)
        with self._file.open("r+b") as file:
            self._mapped = mmap.mmap(file.fileno(), self._size)

    def copy(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if self._mapped is None:
            return value.to("cpu", copy=True)
        # A storage of its own for each: of one that is shared transformers would copy every part.
        place = torch.frombuffer(
            self._mapped, dtype=value.dtype, count=value.numel(), offset=self._starts[name]
        )
        return place.view(value.shape).copy_(value)


def export(
    student: Student,
    mesh: Mesh,
    folder: Path,
    *,
    tokenizer: Any,
    card: Callable[[], str],
    own: Callable[[], dict[str, bytes]] = dict,
) -> None:
    """Write `folder`: safetensors, config.json, generation settings, tokenizer, README.md.

    tokenizer: to save beside it, or None. own: what `own_files` returns, called on rank 0.
    Collective; raises StoreError where writing fails.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    weights = folder.with_name(f".{folder.name}.weights")
    mesh.run_on_rank0(lambda: LOCAL.unlink(weights))  # of a run that died here
    state: dict[str, torch.Tensor] = {}

    def write() -> None:
        LOCAL.remove_tree(temporary)
        files = own()
        with without_padding(student, state, special=special_ids(files)) as cut:
            student.model.save_pretrained(temporary, state_dict=cut, max_shard_size=SHARD_SIZE)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if GENERATION in files:
            LOCAL.unlink(temporary / GENERATION)
        for name, content in files.items():
            if not (temporary / name).exists():
                LOCAL.write_new(temporary / name, content)
        LOCAL.write_new(temporary / "README.md", card().encode())
        for file in temporary.iterdir():
            LOCAL.fsync(file)
        LOCAL.fsync_dir(temporary)
        LOCAL.remove_tree(folder)  # one that a run left that died before its end
        LOCAL.replace(temporary, folder)
        LOCAL.fsync_dir(folder.parent)

    try:
        with return_freed_memory():
            state = gathered(student, mesh, file=weights)
        mesh.run_on_rank0(write)
    finally:
        state.clear()
        if mesh.rank == 0:
            LOCAL.unlink(weights)


def student_tokenizer(config: Config) -> Any:
    """Returns the student's tokenizer: its own folder's, else the data's, else None.

    A tokenizer that cannot be loaded does not stop training: the student sees ids only.
    """
    assert config.student is not None
    return _tokenizer(config.student.model, config.student.revision) or _tokenizer(
        config.data.tokenizer or config.teacher.model,
        None if config.data.tokenizer else config.teacher.revision,
    )


def _tokenizer(name: str | None, revision: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    name, revision = tokenizer_source(name, revision, key="student.model")
    if Path(name).is_dir() and not has_tokenizer(Path(name)):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # noqa: BLE001 - transformers 4 raises whatever comes up
        log.debug("%s: no tokenizer: %s", name, error)
        return None


def model_card(
    config: Config,
    *,
    learned: str,
    made_at: float | None,
    steps: int,
    metrics: dict[str, float] | None,
) -> str:
    """Returns README.md of the exported model. made_at: temperature of the targets; None: dense."""
    from megadistill import __version__

    assert config.student is not None
    loss = config.loss
    temperature = format_schedule(loss.temperature)
    if made_at is None:
        at = "" if loss.temperature == 1 else f" at temperature {temperature}"
        divergence = f"{loss.divergence}{at}"
    else:
        divergence = divergence_name(
            loss.divergence,
            kd_temperature=temperature,
            made_at=made_at,
            coarse=any(t != made_at for t in values(loss.temperature)),
        )
    shown = (
        ""
        if metrics is None
        else "- held out: "
        + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        + "\n"
    )
    return CARD.format(
        name=Path(config.train.out_dir).name,
        version=__version__,
        student=shown_name(config.student.model),
        init=f"{config.student.init} weights",
        learned=learned,
        loss=f"{format_schedule(loss.kd_weight)} x {divergence} + "
        f"{format_schedule(loss.ce_weight)} x cross-entropy"
        + _feature_terms(config)
        + (f", curriculum {loss.curriculum}" if loss.curriculum else ""),
        steps=steps,
        batch=config.train.global_batch,
        seq_len=config.data.seq_len,
        metrics=shown,
    )


def _feature_terms(config: Config) -> str:
    loss = config.loss
    said = {
        "hidden": f" + {format_schedule(loss.hidden_weight)} x hidden states "
        f"({config.features.hidden_loss})",
        "attention": f" + {format_schedule(loss.attention_weight)} x attention",
    }
    return "".join(said[name] for name in loss.aligned)


def check_tokenizer(config: Config, stored: dict[str, Any], *, store: str) -> int:
    """Returns the number of ids of the student's own tokenizer; 0 if its folder has none.

    stored: the tokenizer in the store's recipe. Raises ConfigError if the student's tokenizer gives
    other ids to a text. Added tokens are allowed.
    """
    from megadistill.data.tokenizer import count_ids, tokenizer_identity

    assert config.student is not None
    tokenizer = _tokenizer(config.student.model, config.student.revision)
    if tokenizer is None or not tokenizer.is_fast:
        return 0
    content, ids = stored["content"], int(stored["vocab_size"])
    own = tokenizer_identity(tokenizer, below=ids)["content"]
    if own != content:
        raise ConfigError(
            f"student.model: {config.student.model} has the tokenizer {own[:16]}, {store} was made "
            f"with {content[:16]}: take a student of the same tokenizer, or remove the tokenizer "
            "from its folder if you know that the ids agree"
        )
    return count_ids(tokenizer)
