"""A training step from a cache against the same step on hard labels: what learning from it costs.

cache   tokens and targets are read and decoded, kd_weight 1 and ce_weight 1
labels  the same tokens from a token store, ce_weight 1 alone

Both are `train.loop.run_step`, whole, of one engine under ZeRO-3: reading, forward, backward,
update. They take turns and change places from pair to pair, so that a machine that slows down or
speeds up meets both.

Found with two ranks on two quiet cores, V = 32,000, H = 512, 4 layers, 8 x 512 tokens, 15 pairs:
1.012 (0.91 to 1.06), 7.6 s a step.

Shapes: C positions of a chunk, V vocabulary, N positions.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from megadistill.bench.log_probs import Synthetic
from megadistill.bench.rounds import ratio
from megadistill.blocks import BlockWriter
from megadistill.cache.writer import CacheWriter
from megadistill.config import Config
from megadistill.data.order import Order
from megadistill.parallel import Mesh
from megadistill.targets import SparseTargets, concatenate
from megadistill.teacher.select import select_targets
from megadistill.train.checkpoint import Position
from megadistill.train.loop import run_step
from megadistill.train.nonfinite import NonFinite
from megadistill.train.online.online_teacher import OnlineTeacher
from megadistill.train.run import Run, build
from megadistill.train.run_folder import RunFolder
from megadistill.train.stopping import Flags
from megadistill.train.student_engine import Trainer
from megadistill.train.training_source import open_sources

BLOCK = 16  # sequences


@dataclass(frozen=True)
class StepSizes:
    """Sizes of the student, a Llama, and of a step."""

    vocab: int = 32_000
    hidden: int = 512
    layers: int = 4
    seq_len: int = 512
    global_batch: int = 8
    micro_batch: int = 2


def step_cost(sizes: StepSizes, mesh: Mesh, *, pairs: int) -> dict[str, Any]:
    """The medians of `pairs` pairs, on every rank of the mesh. Collective.

    Writes its stores to the temporary folder (TMPDIR), which all ranks must share, and removes
    them.
    """
    folder = Path(mesh.broadcast(_made(sizes) if mesh.rank == 0 else None))
    try:
        cached = _run(folder, sizes, mesh, kd_weight=1.0)
        trainer = build(cached, mesh)
        labelled = _run(folder, sizes, mesh, kd_weight=0.0)
        seconds = timed_steps(trainer, {"cache": cached, "labels": labelled}, mesh, rounds=pairs)
    finally:
        mesh.barrier()
        if mesh.rank == 0:
            shutil.rmtree(folder)
    return {
        "data": f"{mesh.world} ranks, V {sizes.vocab:,}, H {sizes.hidden}, {sizes.layers} layers, "
        f"{sizes.global_batch} x {sizes.seq_len} tokens a step",
        "pairs": pairs,
        "cache_s": statistics.median(seconds["cache"]),
        "labels_s": statistics.median(seconds["labels"]),
        **ratio(seconds["cache"], seconds["labels"]),
    }


def timed_steps(
    trainer: Trainer,
    runs: dict[str, Run],
    mesh: Mesh,
    *,
    rounds: int,
    teachers: Mapping[str, OnlineTeacher] = MappingProxyType({}),
    reporter: Any = None,
) -> dict[str, list[float]]:
    """The seconds of `rounds` steps of each run, all of one engine. Collective.

    They take turns, and begin with another one from round to round. A round before these warms up.
    teachers: of the runs that have one beside them. reporter: gets each step's line, under the name
    of its run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    at, names = Position(0, 0, 0), list(runs)
    with contextlib.ExitStack() as stack:
        batches = {name: stack.enter_context(run.batches(mesh)) for name, run in runs.items()}
        for number in range(-1, rounds):
            turn = (number + 1) % len(names)
            for name in names[turn:] + names[:turn]:
                run, trainer.teacher = runs[name], teachers.get(name)
                policy = NonFinite(run.config.train, mesh, run.stores, skipped=0)
                mesh.barrier()
                started = time.perf_counter()
                run_step(
                    run,
                    trainer,
                    batches[name],
                    policy,
                    at,
                    None if reporter is None else reporter(name),
                    Flags(0, 0, 0),
                )
                mesh.barrier()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def _run(folder: Path, sizes: StepSizes, mesh: Mesh, *, kd_weight: float) -> Run:
    """A run of steps enough for both sides, from the cache or from the token store."""
    config = Config.model_validate(
        {
            "data": {"files": ["none"], "seq_len": sizes.seq_len},
            "teacher": {"model": "none"},
            "cache": {"dir": str(folder / ("cache" if kd_weight else "tokens"))},
            "student": {"model": str(folder / "student"), "init": "random"},
            "loss": {"kd_weight": kd_weight, "ce_weight": 1.0},
            "train": {
                "out_dir": str(folder / "out"),
                "steps": 10**6,
                "global_batch": sizes.global_batch,
                "micro_batch": sizes.micro_batch,
            },
            "parallel": {"cpu_threads": torch.get_num_threads()},
        }
    )
    stores = open_sources(config)
    order = Order(
        [len(s) for s in stores],
        block_size=[BLOCK],
        weights=[1.0],
        global_batch=sizes.global_batch,
        seed=0,
        groups=config.order.groups,
        shuffle=config.order.shuffle,
    )
    run_folder = RunFolder(config.train.out_dir)
    return Run(config, stores, order, None, run_folder, 10**6, sizes.vocab)


def _made(sizes: StepSizes) -> str:
    """A folder with a student's configuration, a token store, and a varopt cache of it."""
    folder = Path(tempfile.mkdtemp(prefix="megadistill-bench-"))
    (folder / "student").mkdir()
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": 4 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": max(1, sizes.hidden // 64),
        "max_position_embeddings": sizes.seq_len,
        "tie_word_embeddings": False,
    }
    (folder / "student" / "config.json").write_text(json.dumps(settings))
    recipe = {
        "method": "varopt",
        "temperature": 1.0,
        "vocab_size": sizes.vocab,
        "seq_len": sizes.seq_len,
        "tokenizer": {"content": "none", "vocab_size": sizes.vocab},
    }
    columns = {"tokens": f"ndarray:uint32:{sizes.seq_len}", "documents": "ndarray:uint32"}
    sequences = max(2 * BLOCK, -(-sizes.global_batch // BLOCK) * BLOCK)
    rng = np.random.default_rng(0)
    samples = [
        {
            "tokens": rng.integers(sizes.vocab, size=sizes.seq_len, dtype=np.uint32),
            "documents": np.zeros(1, np.uint32),
        }
        for _ in range(sequences)
    ]
    tokens = BlockWriter.create(
        folder / "tokens",
        kind="tokens",
        header={"recipe": recipe},
        columns=columns,
        block_size=BLOCK,
    )
    cache = BlockWriter.create(
        folder / "cache",
        kind="cache",
        header={"recipe": recipe},
        columns=columns | {"targets": "bytes"},
        block_size=BLOCK,
    )
    for store in (tokens, cache):
        store.plan(sequences)
    targets = _targets(sizes, sequences)
    with CacheWriter(cache) as writer:
        for block in range(sequences // BLOCK):
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            tokens.commit(block, samples[rows], statistics={})
            writer.submit(block, samples[rows], targets[rows])
    for store in (tokens, cache):
        store.finish()
    return str(folder)


def _targets(sizes: StepSizes, sequences: int) -> list[SparseTargets]:
    """The varopt targets of each sequence."""
    parts, done = [], 0
    for log_probs_CV in Synthetic(sizes.vocab, sequences * sizes.seq_len):
        rows = torch.arange(done, done + len(log_probs_CV))
        done += len(rows)
        keys_N2 = torch.stack([rows // sizes.seq_len, rows % sizes.seq_len], 1)
        parts.append(select_targets(log_probs_CV, method="varopt", keys_N=keys_N2).numpy())
    whole = concatenate(parts)
    return [whole.rows(i, i + sizes.seq_len) for i in range(0, done, sizes.seq_len)]
