"""Measure: ratios within one run.

    python tools/bench.py storage [--vocab_size V ...] [--teacher DIR] [--json]
    python tools/bench.py codec   [--vocab_size V] [--json]
    python tools/bench.py writer  [--teacher DIR] [--tokens DIR] [--pairs 15] [--blocks 2] [--json]
    python tools/bench.py head    [--positions N] [--hidden H] [--vocab_size V] [--entries K ...]
    deepspeed --num_gpus 2 tools/bench.py step [--hidden H] [--layers L] [--seq_len T] [--pairs 15]
    deepspeed --num_gpus 2 tools/bench.py online [--config demo.yaml] [--pairs 15]
    python tools/bench.py subset  [--positions N] [--vocab_size V] [--entries K ...]
    python tools/bench.py projector [--positions N] [--vocab_size V] [--hidden H]
    python tools/bench.py apart   [--hidden H] [--seq_len T] [--pairs 15]
    python tools/bench.py angle   [--teacher DIR] [--tokens DIR] [--student DIR] [--bytes 13]

storage  bytes per token of varopt and top-64, beside their streams' entropy and other formats
codec    positions a second and core for encoding and decoding, per method
writer   seconds of generating with the writer on over those with it off, in pairs
head     seconds and memory of fused distillation and cross-entropy over plain cross-entropy
step     seconds of a training step from a cache over one on hard labels, in pairs
online   seconds of a step with an online teacher over one from a cache
subset   seconds of other losses on given logits over the union of both sides' most probable ids
projector  seconds of a teacher's states through its own embeddings over ours through the projector
apart    seconds of a forward pass with documents apart, for models with a state, over one without
angle    degrees between the gradients of sparse and full distillation, while a student learns

The teacher is the demo's by default (`make demo` makes it); without it only synthetic ones are
measured, and that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megadistill.cli.command_line import amount, count

USUAL = {
    "vocab_size": [128_256, 151_936, 262_144],
    "positions": 4096,
    "hidden": 1024,
    "seq_len": 2048,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "head": {"vocab_size": [131_072], "positions": 2048},
    "step": {"vocab_size": [32_000], "hidden": 512, "seq_len": 512},
    "subset": {"vocab_size": [152_000], "positions": 256},
    "projector": {"vocab_size": [152_000], "positions": 256, "hidden": 2048},
    "apart": {"hidden": 256},
}


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    import torch

    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(1 if args.what in ("codec", "angle") else max(1, cores))
    for row in MEASURES[args.what](args):
        print(json.dumps(row, sort_keys=True) if args.json else line(row), flush=True)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(MEASURES))
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--vocab_size", type=count, nargs="+")
    parser.add_argument(
        "--positions", type=count, help="default: 4096; head: 2048; subset, projector: 256"
    )
    parser.add_argument(
        "--hidden",
        type=count,
        help="hidden size; default: 1024; step: 512; projector: 2048; apart: 256",
    )
    parser.add_argument("--layers", type=count, default=4, help="of step's student")
    parser.add_argument("--entries", type=count, nargs="+", default=[8, 64], help="of a position")
    parser.add_argument("--seq_len", type=count, help="of a sequence; default: 2048; step: 512")
    parser.add_argument("--teacher", default="runs/demo/teacher", help="a model's folder")
    parser.add_argument("--tokens", default="runs/demo/tokens", help="its token store")
    parser.add_argument(
        "--entropy", type=amount, default=1.9, help="nats to sharpen it to; 0: leave it"
    )
    parser.add_argument("--config", default="demo.yaml", help="online: of training from a cache")
    parser.add_argument("--pairs", type=count, default=15, help="runs of each of two sides")
    parser.add_argument("--blocks", type=count, default=2, help="blocks of a run")
    parser.add_argument("--student", default="runs/demo/student_init", help="its config.json")
    parser.add_argument("--bytes", type=amount, default=13.0, help="of a position of varopt")
    parser.add_argument("--batches", type=count, default=20, help="of 16 sequences, to measure on")
    parser.add_argument("--steps", type=count, default=200, help="that the student is trained")
    parser.add_argument("--seconds", type=amount, default=2.0, help="for each figure of codec")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    args = parser.parse_args(arguments)
    own = DEFAULTS.get(args.what, {})
    for name, usual in USUAL.items():
        if getattr(args, name) is None:
            setattr(args, name, own.get(name, usual))
    return args


def storage(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megadistill.bench.log_probs import Synthetic, trained
    from megadistill.bench.storage import storage as measure

    if Path(args.teacher).is_dir():
        teacher = trained(args.teacher, args.tokens, positions=args.positions, entropy=args.entropy)
        yield from measure(teacher, seq_len=args.seq_len)
    else:
        print(f"{args.teacher}: not there, left out: `make demo` makes it", file=sys.stderr)
    for vocab_size in args.vocab_size:
        yield from measure(Synthetic(vocab_size, args.positions), seq_len=args.seq_len)


def codec(args: argparse.Namespace) -> list[dict[str, Any]]:
    from megadistill.bench.log_probs import Synthetic
    from megadistill.bench.speed import speed

    return speed(Synthetic(args.vocab_size[0], args.seq_len), seconds=args.seconds)


def writer(args: argparse.Namespace) -> list[dict[str, Any]]:
    from megadistill import parallel
    from megadistill.bench.writing_cost import writer_cost
    from megadistill.blocks import open_store
    from megadistill.config import load_config

    tokens = open_store(args.tokens)
    config = load_config(
        "demo.yaml",
        [
            f"teacher.model={args.teacher}",
            f"data.dir={args.tokens}",
            f"data.seq_len={tokens.recipe['seq_len']}",
        ],
    )
    with parallel.joined(tp=1) as mesh:
        return [writer_cost(config, mesh, pairs=args.pairs, blocks=args.blocks)]


def head(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megadistill.bench.fused_head import Sizes, head_cost

    sizes = Sizes(args.positions, args.hidden, args.vocab_size[0])
    return head_cost(sizes, args.entries, rounds=args.pairs)


def step(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from megadistill import parallel
    from megadistill.bench.step import StepSizes, step_cost

    sizes = StepSizes(args.vocab_size[0], args.hidden, args.layers, args.seq_len)
    with parallel.joined(tp=1, cpu_threads=torch.get_num_threads()) as mesh:
        row = step_cost(sizes, mesh, pairs=args.pairs)
        return [row] if mesh.rank == 0 else []


def online(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from megadistill import parallel
    from megadistill.bench.online_step import online_cost
    from megadistill.config import load_config

    config = load_config(args.config, [f"parallel.cpu_threads={torch.get_num_threads()}"])
    with parallel.joined(tp=config.teacher.tp, **config.parallel.model_dump()) as mesh:
        rows = list(online_cost(config, mesh, rounds=args.pairs))
        return rows if mesh.rank == 0 else []


def subset(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megadistill.bench.subset import SubsetSizes, subset_cost

    for entries in args.entries:
        sizes = SubsetSizes(args.positions, args.vocab_size[0], entries)
        yield subset_cost(sizes, rounds=args.pairs)


def projector(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megadistill.bench.projector import ProjectorSizes, projector_cost

    vocab = args.vocab_size[0]
    for student_vocab in (-(-vocab // 5), vocab):
        sizes = ProjectorSizes(args.positions, vocab, args.hidden, student_vocab, args.hidden // 2)
        yield projector_cost(sizes, rounds=args.pairs)


def apart(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megadistill.bench.apart import ApartSizes, apart_cost

    return apart_cost(ApartSizes(seq_len=args.seq_len, hidden=args.hidden), rounds=args.pairs)


def angle(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from megadistill.bench.angle import Plan, Pupil, Teacher, angles

    plan = Plan(
        batches=args.batches,
        steps=args.steps,
        target_bytes=args.bytes,
        entropy=args.entropy or None,
    )
    return angles(Teacher(args.teacher, args.tokens, plan), Pupil(args.student))


MEASURES: dict[str, Callable[[argparse.Namespace], Iterable[dict[str, Any]]]] = {
    "storage": storage,
    "codec": codec,
    "writer": writer,
    "head": head,
    "step": step,
    "online": online,
    "subset": subset,
    "projector": projector,
    "apart": apart,
    "angle": angle,
}


def line(row: dict[str, Any]) -> str:
    """A row for people: what it is about first, then figures."""
    words = [str(row[k]) for k in ("data", "method") if k in row]
    figures = [
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v:,}"
        for k, v in row.items()
        if not isinstance(v, str)
    ]
    return f"{', '.join(words)}:\n    {'; '.join(figures)}"
