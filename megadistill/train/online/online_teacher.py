"""The online teacher: it answers a step's micro-batches before the student sees them.

Teacher and student stand on the same ranks. Every rank has micro-batches of its own, and the ranks
of a tensor-parallel group hold one teacher together: so they pool their micro-batches, the teacher
answers for all, and each rank keeps what is its own. Under `zero3`, whose forwards are collective,
all ranks ask equally often, as they have equally many micro-batches.

What is kept until the student's turn is small: sparse targets, or of methods that compare whole
distributions the teacher's hidden states, [N, H] of the step's positions on this rank.

Nothing is remembered from step to step, so a run resumes, at any number of ranks, as one from a
cache does. Draws have the keys of a cache: (sequence, position), in every epoch the same.

Shapes: B sequences, T positions, N = B*T, H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megadistill.blocks import open_store
from megadistill.cache.cache_recipe import cache_recipe
from megadistill.config import Config
from megadistill.data.tokens import build_tokens
from megadistill.models.layers import watched
from megadistill.parallel import Mesh, Unjoined
from megadistill.student.features import FeaturePlan, Features
from megadistill.targets import SparseTargets, find_method
from megadistill.targets.dense import DenseTargets
from megadistill.teacher.engine import Teacher, load_teacher
from megadistill.teacher.select import selection
from megadistill.train.online.projected_teacher import Tokenizers, projected
from megadistill.train.training_source import MicroBatch, TrainingSource, open_sequences

# Of a cache's recipe: what changes a cache's bytes at most by rounding, and notes of the teacher's.
_FREE = ("attention", "engine", "entropy", "micro_batch", "nll", "tp")


class OnlineTeacher:
    """The teacher of a run, loaded and ready. DeepSpeed wants it made after the student."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        sequences: TrainingSource,
        *,
        features: FeaturePlan | None = None,
        key: str = "teacher",
    ) -> None:
        """Collective. sequences: the store whose numbers the keys are of. features: to be kept.

        key: where the configuration has it, for messages.
        """
        method = find_method(config.targets.method)
        self._whole = method.whole_head
        # Whose tokens may be others than the teacher's.
        self.tokenizers = Tokenizers(config) if method.own_tokenizer else None
        own = None if self.tokenizers is None else self.tokenizers.teacher_ids
        self.teacher: Teacher = load_teacher(
            config,
            mesh,
            vocab_size=own or sequences.vocab_size,
            whole_head=self._whole,
            key=f"{key}.model",
        )
        self._config, self._mesh, self._sequences = config, mesh, sequences
        self._features = features
        with self.teacher.on_device(offload=config.teacher.offload is not None):
            pass  # asleep from the start, where another one is to be loaded

    def answer(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with targets, and their kd_count. Collective over all ranks.

        TeacherError, naming the sequence, where the teacher says what is no distribution.
        """
        with self.teacher.on_device(offload=self._config.teacher.offload is not None):
            return [self._answered(batch) for batch in micro_batches]

    @torch.no_grad()
    def _answered(self, batch: MicroBatch) -> MicroBatch:
        mesh, (B, T) = self._mesh, batch.tokens_BT.shape
        numbers = np.array([self._sequences.number(i) for _, i in batch.names])
        keys_N2 = np.stack([np.repeat(numbers, T), np.tile(np.arange(T), B)], 1)
        pooled = mesh.gather(
            (batch.tokens_BT, batch.labels_N, keys_N2, batch.padding_B, batch.documents),
            group=mesh.tp_group,
        )
        *arrays, lists = zip(*pooled, strict=True)
        tokens_BT, labels_N, keys_N2, padding_B = (np.concatenate(each) for each in arrays)
        documents = [starts for each in lists for starts in each]
        rows_N = None
        if self.tokenizers is not None:
            settings = self.teacher.engine.module.config.get_text_config()
            tokens_BT, documents, rows_N = self.tokenizers.read(
                tokens_BT,
                documents,
                padding_B,
                longest=getattr(settings, "max_position_embeddings", None),
            )
        hidden_NH, features = self._asked(tokens_BT, documents)
        mine = slice(mesh.tp_rank * B * T, (mesh.tp_rank + 1) * B * T)
        if features is not None:
            batch = replace(batch, features=_own(features, mesh))
        if not self._config.loss.learns_from_teacher:
            return batch
        if rows_N is not None:
            said = projected(hidden_NH, rows_N[mine])
            count = int((rows_N[mine] >= 0)[batch.labels_N != -100].sum())
            return replace(batch, targets=said, kd_count=count)
        if self._whole:
            method = find_method(self._config.targets.method)
            k = method.read(self._config.targets).get("k")
            targets: Any = DenseTargets(hidden_NH[mine].clone(), self.teacher.head, k)
            return replace(batch, targets=targets, kd_count=batch.ce_count)
        targets = self._select(hidden_NH, labels_N, keys_N2).rows(mine.start, mine.stop)
        valid_N = torch.as_tensor(batch.labels_N != -100, device=targets.counts.device)
        count = int((valid_N & (targets.counts > 0)).sum())
        entropy = targets.entropy_sum(valid_N)
        return replace(batch, targets=targets, kd_count=count, kd_entropy=entropy)

    def _asked(
        self, tokens_BT: np.ndarray, documents: list[np.ndarray]
    ) -> tuple[torch.Tensor, Features | None]:
        """The last hidden states of what the group pooled, and the features to align with."""
        plan, rows = self._features, self._config.teacher.micro_batch
        hidden, parts = [], []
        for i in range(0, len(tokens_BT), rows):
            with watched(self.teacher.engine.module, **(plan.of_teacher if plan else {})) as seen:
                hidden.append(self.teacher.hidden(tokens_BT[i : i + rows], documents[i : i + rows]))
            if plan is not None:
                parts.append(Features.of(seen, plan.of_teacher))
        if plan is None:
            return torch.cat(hidden), None
        return torch.cat(hidden), Features.joined(parts)

    def _select(
        self, hidden_NH: torch.Tensor, labels_N: np.ndarray, keys_N2: np.ndarray
    ) -> SparseTargets:
        """The targets of all that the group pooled; every rank of it takes part in every row."""
        device = self.teacher.device
        # The entropy turns the cross-entropy that sampled targets are trained with into a KL to
        # show, for one more pass over the teacher's logits.
        sampled = find_method(self._config.targets.method).sampled
        settings = selection(self._config.targets) | {"entropy": sampled, "nll": False}
        return self.teacher.head.targets(
            hidden_NH,
            torch.as_tensor(labels_N, device=device),
            torch.as_tensor(keys_N2, device=device),
            temperature=self._config.targets.temperature,
            **settings,
        )


def _own(pooled: Features, mesh: Mesh) -> Features:
    """Returns this rank's share of the features that its group pooled, in memory of its own."""

    def mine(rows: torch.Tensor) -> torch.Tensor:
        return rows.tensor_split(mesh.tp)[mesh.tp_rank]

    # Each rank of a group has an equal number of the teacher's heads.
    whole = [mesh.sum(rows, group=mesh.tp_group) / mesh.tp for rows in pooled.attention]
    return Features(
        tuple(mine(rows).clone() for rows in pooled.hidden), tuple(mine(rows) for rows in whole)
    )


def tokenise(config: Config, mesh: Mesh) -> None:
    """Make what is missing of the token store, on rank 0. Collective."""

    def work() -> None:
        build_tokens(config, blocks=blocks_needed(config))

    mesh.run_on_rank0(work)


def blocks_needed(config: Config) -> int | None:
    """Blocks to read of a corpus without a known end; None for all there are."""
    if not config.stream_is_unbounded:
        return None
    return math.ceil(config.sequences_needed / config.data.block_size)


def open_online(config: Config, mesh: Mesh | Unjoined) -> list[TrainingSource]:
    """The token store, as sequences whose targets the teacher gives when they are needed.

    Collective; rank 0 reads the teacher's files, since what it is, is part of what the run is.
    """
    needed, blocks = blocks_needed(config), None
    if needed is not None and not open_store(config.data.dir).complete():
        blocks = tuple(range(needed))
    store = open_sequences(config.data.dir, key="data.dir", with_targets=False, blocks=blocks)
    recipe = online_recipe(config, mesh, store)
    return [replace(store, has_targets=config.loss.learns_from_teacher, online=recipe)]


def online_recipe(
    config: Config, mesh: Mesh | Unjoined, store: TrainingSource, *, key: str = "teacher"
) -> dict[str, Any]:
    """Returns what the targets of `config`'s teacher depend on. Collective; rank 0 reads files."""

    def known() -> dict[str, Any]:
        recipe = cache_recipe(config, store.store, key=f"{key}.model")
        if find_method(config.targets.method).own_tokenizer:
            recipe["teacher_tokenizer"] = Tokenizers(config).teacher_content
        return recipe

    return {name: value for name, value in mesh.run_on_rank0(known).items() if name not in _FREE}
