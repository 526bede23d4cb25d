"""The angle between a student's gradient from sparse targets and that of full distillation.

A student of the demo's kind is trained by full distillation from the demo's teacher; at the start,
in the middle and at the end its gradient by all parameters is taken for each of a number of
batches, from the teacher's whole distribution and from sparse targets of it that went through the
cache's codec and back. An angle of 0 means that the cache loses nothing.

varopt            tau chosen so that a position takes --bytes, its entropy and nll left out
multinomial       50 draws with replacement (random sampling distillation, arXiv 2503.16870, which
                  stores 3 bytes an entry, 36 a position)
top-k             renormalised: what is usual, and biased
top-k with tail   the same list, the mass left out as one bucket

The teacher is sharpened to a mean entropy, by default 1.9 nats, which is that of large ones; the
demo's own has 4.4 nats, and there a position needs more bytes. `bytes` are those of our codec.

Mean degrees over 20 batches of 2,048 positions, at the start, in the middle and at the end:

    varopt            1.7   1.5   2.1   12.7 bytes per token
    50 draws          2.6   2.5   3.6   15.2 (34 at 3 bytes an entry)
    top-12            5.0  16.8  22.6   23.2
    top-12 with tail  1.7  16.9  20.2   23.2
    top-50            1.7   7.9  11.0   83.9
    top-50 with tail  0.5   8.7  10.7   83.9

Shapes: B sequences, T positions, N = B*T positions, V vocabulary, K entries.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from megadistill.api.fused_loss import fused_linear_distillation
from megadistill.bench.log_probs import mean_entropy, temperature_of
from megadistill.blocks import open_store
from megadistill.cache.codec import decode_targets, encode_targets
from megadistill.cache.ranking import IdRanking, rank_ids
from megadistill.config import TeacherConfig
from megadistill.errors import StoreError
from megadistill.models.pretrained import load_pretrained
from megadistill.targets import SparseTargets, concatenate
from megadistill.teacher.select import select_targets

LISTS = (12, 50)
SAMPLED = 4  # batches
LR, WARMUP = 2e-3, 25  # the demo's


@dataclass(frozen=True)
class Plan:
    """batch: sequences. entropy: nats, or None for the teacher as it is."""

    batches: int = 20
    batch: int = 16
    steps: int = 200
    target_bytes: float = 13.0
    draws: int = 50
    entropy: float | None = 1.9


class Teacher:
    """A model in a folder over the sequences of a token store, sharpened."""

    def __init__(self, model: str, tokens: str, plan: Plan) -> None:
        self.store = open_store(tokens)
        if len(self.store) < (plan.batches + 1) * plan.batch:
            raise StoreError(
                f"{tokens}: holds {len(self.store)} sequences, expected at least "
                f"{(plan.batches + 1) * plan.batch}: set --batches lower"
            )
        self.model = load_pretrained(
            TeacherConfig(model=model), key="--teacher", dtype=torch.float32
        )
        self.plan, self.vocab_size = plan, self.model.config.vocab_size
        self.ranking: IdRanking = rank_ids(self.store, vocab_size=self.vocab_size)
        self.temperature = 1.0
        if plan.entropy is not None:
            self.temperature = temperature_of(self.logits(self.sample()), plan.entropy)

    def measured(self, number: int) -> torch.Tensor:
        """[B, T] token ids of a batch that is never trained on."""
        return self._tokens(range(number * self.plan.batch, (number + 1) * self.plan.batch))

    def sample(self) -> torch.Tensor:
        """[B, T] token ids of some measured batches, to settle entropy and tau on."""
        numbers = range(0, self.plan.batches, max(1, self.plan.batches // SAMPLED))
        return torch.cat([self.measured(number) for number in numbers])

    def trained(self, step: int) -> torch.Tensor:
        """[B, T] token ids of a step, from the sequences that are not measured on."""
        first, batch = self.plan.batches * self.plan.batch, self.plan.batch
        rows = range(step * batch, (step + 1) * batch)
        return self._tokens([first + row % (len(self.store) - first) for row in rows])

    def _tokens(self, rows: Any) -> torch.Tensor:
        return torch.from_numpy(
            np.stack([self.store[row]["tokens"] for row in rows]).astype(np.int64)
        )

    @torch.no_grad()
    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.model(ids_BT).logits.flatten(0, 1)

    def log_probs(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """float32 [N, V]."""
        return torch.log_softmax(self.logits(ids_BT) / self.temperature, 1)


class Cached:
    """Targets as a student finds them: chosen, encoded by sequence, decoded. Counts the bytes."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.options = {"vocab_size": teacher.vocab_size, "ranking": teacher.ranking}

    def of(
        self, log_probs_NV: torch.Tensor, first: int, **selection: Any
    ) -> tuple[SparseTargets, float]:
        """(targets, bytes per token); `first` is the first sequence's number."""
        seq_len = self.teacher.store.recipe["seq_len"]
        rows_N = torch.arange(len(log_probs_NV))
        keys_N2 = torch.stack([first + rows_N // seq_len, rows_N % seq_len], 1)
        chosen = select_targets(
            log_probs_NV, keys_N=keys_N2, entropy=False, nll=False, **selection
        ).numpy()
        parts, size = [], 0
        for start in range(0, len(chosen), seq_len):
            data = encode_targets(chosen.rows(start, start + seq_len), **self.options)
            parts.append(decode_targets(data, **self.options))
            size += len(data)
        return concatenate(parts).torch(), size / len(chosen)

    def tau(self, log_probs_NV: torch.Tensor, target_bytes: float) -> float:
        """The smallest tau, to a hundredth, with which a position takes no more than that."""
        low, high = 1e-3, 1.0
        while high > 1.01 * low:
            tau = math.sqrt(low * high)
            _, size = self.of(log_probs_NV, 0, method="varopt", tau=tau)
            low, high = (tau, high) if size > target_bytes else (low, tau)
        return high


def renormalised(listed: SparseTargets) -> SparseTargets:
    """topk without its tail, made to sum to 1, as cross-entropy from it is commonly trained.

    It is the forward KL of such a row but for a constant that no gradient sees.
    """
    rows_E = torch.repeat_interleave(torch.arange(len(listed)), listed.counts)
    total_N = torch.zeros(len(listed)).index_add_(0, rows_E, listed.weights)
    return dataclasses.replace(
        listed,
        method="multinomial",
        weights=listed.weights / total_N[rows_E],
        tail=torch.zeros_like(listed.tail),
        truth_added=None,
    )


class Pupil:
    """The student, and its gradient by all parameters as one vector."""

    def __init__(self, config_folder: str, seed: int = 0) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(seed)
        self.model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(config_folder), dtype=torch.float32
        )
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1
        )

    def hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.model.base_model(ids_BT).last_hidden_state.flatten(0, 1)

    def full(self, hidden_NH: torch.Tensor, log_probs_NV: torch.Tensor) -> torch.Tensor:
        """KL(teacher || student) over the whole vocabulary, mean over positions."""
        log_q_NV = torch.log_softmax(self.model.lm_head(hidden_NH), 1)
        return torch.nn.functional.kl_div(
            log_q_NV, log_probs_NV, log_target=True, reduction="batchmean"
        )

    def sparse(self, hidden_NH: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
        labels_N = torch.zeros(len(hidden_NH), dtype=torch.long)  # all take part; ce_weight is 0
        return fused_linear_distillation(hidden_NH, self.model.lm_head.weight, targets, labels_N)

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(loss, self.parameters, retain_graph=True)
        return torch.cat([grad.flatten().double() for grad in grads])

    def step(self, ids_BT: torch.Tensor, log_probs_NV: torch.Tensor, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss = self.full(self.hidden(ids_BT), log_probs_NV)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return float(loss.detach())


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Degrees."""
    cosine = float(a @ b / (a.norm() * b.norm()))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def angles(teacher: Teacher, pupil: Pupil) -> Iterator[dict[str, Any]]:
    """A row for each stage of training and each kind of targets."""
    plan, cached = teacher.plan, Cached(teacher)
    log_probs_NV = teacher.log_probs(teacher.sample())
    tau = cached.tau(log_probs_NV, plan.target_bytes)
    common = {"entropy": mean_entropy(log_probs_NV), "tau": tau, "batches": plan.batches}
    batches = [_batch(cached, number, tau) for number in range(plan.batches)]
    stages = {0: "start", plan.steps // 2: "middle", plan.steps: "end"}
    for step in range(plan.steps + 1):
        if step in stages:
            yield from _stage(teacher, pupil, batches, {"data": stages[step], **common})
        ids_BT = teacher.trained(step)
        share = (step + 1) / WARMUP if step < WARMUP else _cosine(step, plan.steps)
        pupil.step(ids_BT, teacher.log_probs(ids_BT), LR * share)


def _cosine(step: int, steps: int) -> float:
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


class Kind(NamedTuple):
    """Targets that keep a batch's distributions in one way."""

    name: str
    targets: SparseTargets
    size: float  # bytes per token


def _batch(cached: Cached, number: int, tau: float) -> tuple[torch.Tensor, list[Kind]]:
    """Token ids, and the targets of every kind: those of a cache, the same at every stage."""
    plan, ids_BT = cached.teacher.plan, cached.teacher.measured(number)
    log_probs_NV, first = cached.teacher.log_probs(ids_BT), number * plan.batch
    choose = partial(cached.of, log_probs_NV, first)
    kinds = [
        Kind("varopt", *choose(method="varopt", tau=tau)),
        Kind(f"{plan.draws} draws", *choose(method="multinomial", draws=plan.draws)),
    ]
    for k in LISTS:
        listed, size = choose(method="topk", k=k)
        kinds += [
            Kind(f"top-{k}", renormalised(listed), size),
            Kind(f"top-{k} with tail", listed, size),
        ]
    return ids_BT, kinds


def _stage(
    teacher: Teacher,
    pupil: Pupil,
    batches: list[tuple[torch.Tensor, list[Kind]]],
    common: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    degrees: dict[str, list[float]] = {kind.name: [] for kind in batches[0][1]}
    losses = []
    for ids_BT, kinds in batches:
        hidden_NH = pupil.hidden(ids_BT)
        loss = pupil.full(hidden_NH, teacher.log_probs(ids_BT))
        losses.append(float(loss.detach()))
        whole = pupil.gradient(loss)
        for kind in kinds:
            sparse = pupil.gradient(pupil.sparse(hidden_NH, kind.targets))
            degrees[kind.name].append(angle(whole, sparse))
    for place, (name, found) in enumerate(degrees.items()):
        kept = [kinds[place] for _, kinds in batches]
        yield {
            **common,
            "method": name,
            "kl": statistics.mean(losses),
            "bytes": statistics.mean(k.size for k in kept),
            "entries": statistics.mean(len(k.targets.ids) / len(k.targets) for k in kept),
            "degrees": statistics.mean(found),
            "least": min(found),
            "most": max(found),
        }
