"""Log-probabilities to measure on: a trained teacher's, and synthetic ones at any vocabulary.

Given out in chunks of positions, the same each time they are gone through, so that [N, V] of a
large vocabulary never exists.

Shape letters: C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megadistill.blocks import open_store
from megadistill.cache.ranking import IdRanking, rank_ids
from megadistill.config import TeacherConfig
from megadistill.errors import StoreError
from megadistill.models.pretrained import load_pretrained

CHUNK = 128


@dataclass(frozen=True)
class Synthetic:
    """Like a language model's: (-log(rank + 2.7) + 3 normal) / T, T uniform in 0.25 to 0.75.

    An id's number is its rank.
    """

    vocab_size: int
    positions: int
    seed: int = 0
    ranking: None = None

    @property
    def name(self) -> str:
        return f"synthetic, {self.vocab_size:,} ids"

    def __iter__(self) -> Iterator[torch.Tensor]:
        """float32 [C, V] log-probabilities, chunk by chunk."""
        generator = torch.Generator().manual_seed(self.seed)
        prior_V = -torch.log(torch.arange(self.vocab_size) + 2.7)
        for start in range(0, self.positions, CHUNK):
            rows = min(CHUNK, self.positions - start)
            temperature_C1 = 0.25 + 0.5 * torch.rand(rows, 1, generator=generator)
            logits_CV = torch.randn(rows, self.vocab_size, generator=generator).mul_(3)
            logits_CV += prior_V
            logits_CV /= temperature_C1
            yield torch.log_softmax(logits_CV, 1)


@dataclass(frozen=True)
class Trained:
    """Distributions of a teacher over its own text, scaled by a temperature."""

    logits_NV: torch.Tensor
    temperature: float
    ranking: IdRanking
    name: str

    @property
    def vocab_size(self) -> int:
        return self.logits_NV.shape[1]

    @property
    def positions(self) -> int:
        return len(self.logits_NV)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """float32 [C, V] log-probabilities, chunk by chunk."""
        for logits_CV in self.logits_NV.split(CHUNK):
            yield torch.log_softmax(logits_CV / self.temperature, 1)


def trained(model: str, tokens: str, *, positions: int, entropy: float) -> Trained:
    """The teacher in a folder over the first sequences of a token store.

    entropy: the mean in nats that its logits are scaled to; 0 leaves them as they are.
    Raises StoreError or ConfigError where one of them is not there.
    """
    store = open_store(tokens)
    teacher = load_pretrained(TeacherConfig(model=model), key="--teacher", dtype=torch.float32)
    seq_len = store.recipe["seq_len"]
    if len(store) * seq_len < positions:
        raise StoreError(
            f"{tokens}: holds {len(store) * seq_len} positions, expected at least {positions}: "
            "set --positions lower"
        )
    parts = []
    with torch.inference_mode():
        for start in range(0, -(-positions // seq_len), 8):
            rows = range(start, min(start + 8, -(-positions // seq_len)))
            ids_BT = torch.from_numpy(np.stack([store[i]["tokens"] for i in rows]).astype(np.int64))
            parts.append(teacher(ids_BT).logits.flatten(0, 1))
    logits_NV = torch.cat(parts)[:positions]
    ranking = rank_ids(store, vocab_size=logits_NV.shape[1])
    if entropy == 0:
        return Trained(logits_NV, 1.0, ranking, f"{model} as it is")
    temperature = temperature_of(logits_NV, entropy)
    return Trained(logits_NV, temperature, ranking, f"{model} at {entropy} nats")


def temperature_of(logits_NV: torch.Tensor, entropy: float) -> float:
    """The temperature at which the mean entropy is `entropy` nats, by bisection."""
    low, high = 0.05, 5.0
    for _ in range(40):
        temperature = (low + high) / 2
        below = mean_entropy(torch.log_softmax(logits_NV / temperature, 1)) < entropy
        low, high = (temperature, high) if below else (low, temperature)
    return temperature


def mean_entropy(log_probs_NV: torch.Tensor) -> float:
    """Nats."""
    return float(-(log_probs_NV.exp() * log_probs_NV).sum(1).mean())
