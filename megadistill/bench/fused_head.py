"""The fused head against plain cross-entropy: seconds and memory, forward and backward.

plain  F.cross_entropy(hidden @ weight.T, labels), then backward
fused  distillation from K entries per token and cross-entropy in one call, then backward

Both give the gradients of the hidden states and of the weight, float32. Each round takes
every side once, beginning with another; ratios are fused over plain of the same round, the median
with the least and the most: of seconds on the clock, and of the seconds of all threads (cpu), which
say more where others use the machine. Memory is the process's own peak (VmHWM) in a fresh process
each, less what was there before and the gradients.

What decides the time: three matrix products each, 1.65 TFLOP at N = 2048, H = 1024, V = 131,072.
Beside them plain goes through [N, V] for its log-softmax, the gradient of that and of the loss, and
takes fresh pages for each; fused goes through a chunk's buffer, which stays mapped.

Found on two quiet cores at those sizes, 15 rounds: 0.917 of plain's seconds at K = 8 (0.69 to 1.11;
of all threads' seconds 0.899, 0.82 to 0.97), 0.917 at K = 64 (0.70 to 0.98; 0.899, 0.85 to 0.95),
11.0 s against 12.2 s; memory 266 and 268 MiB over 3,586 MiB, 0.074 and 0.075. A chunk holds 512
rows: their three products take 4.70 s at V = 32,768 on one core, where 256 rows, half the memory,
take 4.90 s, and 2,048 at once 5.00 s. Predicted and found otherwise: to go through a chunk in
blocks of rows that fit the cache, which made the row kernel slower by half.

Shapes: N positions, H hidden size, V vocabulary, K entries.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from megadistill.api.fused_loss import fused_linear_distillation
from megadistill.bench.rounds import ratio
from megadistill.targets import SparseTargets


@dataclass(frozen=True)
class Sizes:
    positions: int = 2048
    hidden: int = 1024
    vocab: int = 131_072

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.hidden * (self.positions + self.vocab)


class Problem:
    """Random hidden states, weight, labels and top-K targets."""

    def __init__(self, sizes: Sizes, entries: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden_NH = torch.randn(sizes.positions, sizes.hidden, generator=generator)
        self.weight_VH = torch.randn(sizes.vocab, sizes.hidden, generator=generator)
        self.weight_VH *= 4 * sizes.hidden**-0.5  # logits of a spread of 4
        for tensor in (self.hidden_NH, self.weight_VH):
            tensor.requires_grad_()
        self.labels_N = torch.randint(sizes.vocab, (sizes.positions,), generator=generator)
        self.targets = random_targets(sizes, entries, generator)

    def plain(self) -> None:
        logits_NV = self.hidden_NH @ self.weight_VH.T
        torch.nn.functional.cross_entropy(logits_NV, self.labels_N).backward()

    def fused(self, targets: SparseTargets | None = None) -> None:
        fused_linear_distillation(
            self.hidden_NH, self.weight_VH, targets or self.targets, self.labels_N, ce_weight=1.0
        ).backward()

    def forget(self) -> None:
        self.hidden_NH.grad = self.weight_VH.grad = None


def random_targets(sizes: Sizes, entries: int, generator: torch.Generator) -> SparseTargets:
    """topk targets: K distinct ids a position, falling weights that leave a tenth as the tail."""
    N, V, K = sizes.positions, sizes.vocab, entries
    start_N1 = torch.randint(V, (N, 1), generator=generator)
    ids_NK = (start_N1 + torch.arange(K) * (V // K)) % V
    weights_K = 1 / torch.arange(1.0, K + 1)
    weights_K *= 0.9 / weights_K.sum()
    return SparseTargets(
        offsets=torch.arange(N + 1) * K,
        ids=ids_NK.flatten(),
        weights=weights_K.repeat(N),
        tail=torch.full((N,), 0.1),
        method="topk",
    )


def head_cost(sizes: Sizes, entries: list[int], *, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each number of entries: what fused costs over plain."""
    plain_bytes = peak_bytes("plain", sizes, entries[0])
    fused_bytes = [peak_bytes("fused", sizes, count) for count in entries]
    plain, *fused = interleaved(sizes, entries, rounds)
    for count, size, taken in zip(entries, fused_bytes, fused, strict=True):
        yield {
            "data": f"N {sizes.positions}, H {sizes.hidden}, V {sizes.vocab:,}, K {count}",
            "entries": count,
            "rounds": rounds,
            "plain_s": statistics.median(plain.wall),
            "fused_s": statistics.median(taken.wall),
            **ratio(taken.wall, plain.wall),
            **ratio(taken.cpu, plain.cpu, name="cpu"),
            "plain_mib": plain_bytes / 2**20,
            "fused_mib": size / 2**20,
            "memory_ratio": size / plain_bytes,
        }


@dataclass(frozen=True)
class Taken:
    """Seconds of one side in each round: on the clock, and of all the process's threads."""

    wall: list[float]
    cpu: list[float]


def interleaved(sizes: Sizes, entries: list[int], rounds: int) -> list[Taken]:
    """Times plain, then fused with each number of entries; each round begins with another."""
    problem = Problem(sizes, entries[0])
    rows = [random_targets(sizes, count, torch.Generator().manual_seed(1)) for count in entries]
    sides: list[Callable[[], None]] = [problem.plain, *(partial(problem.fused, r) for r in rows)]
    small = Problem(Sizes(64, 64, 256), 4)
    small.plain()
    small.fused()
    found = [Taken([], []) for _ in sides]
    for number in range(rounds):
        for place in range(len(sides)):
            at = (number + place) % len(sides)
            problem.forget()
            wall, cpu = time.perf_counter(), time.process_time()
            sides[at]()
            found[at].wall.append(time.perf_counter() - wall)
            found[at].cpu.append(time.process_time() - cpu)
    return found


def peak_bytes(side: str, sizes: Sizes, entries: int) -> int:
    """Returns the peak bytes of one forward and backward, beyond inputs and gradients.

    Runs them in a fresh process. Linux only.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, side, sizes, entries, torch.get_num_threads()).result()


def _peak(side: str, sizes: Sizes, entries: int, threads: int) -> int:
    torch.set_num_threads(threads)
    # Libraries come in, and take their own buffers, at their first use.
    getattr(Problem(Sizes(64, 64, 256), 4), side)()
    problem = Problem(sizes, entries)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    getattr(problem, side)()
    return _status("VmHWM") - before - sizes.gradient_bytes


def _status(name: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
