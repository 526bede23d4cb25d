"""What a run will be: sequences, blocks, bytes, memory, steps. For --dry_run and the disk's check.

Nothing is loaded and nothing is fetched. What is known is said to be known (an existing store
counts its sequences itself), what is worked out from assumptions is said to be estimated, and the
assumptions stand here:

    text            3.5 bytes a token at a vocabulary below 10,000 (measured: the standard library
                    at 4,096), 4.2 above
    documents       1,000 tokens each where only their number is known (FineWeb-Edu: about 1,030)
    varopt          0.6/tau + 1 entries a position, 0.25/tau of them heads; at most 1/tau + 1. A
                    teacher that is sure of itself has fewer, an unsure one is near the bound
    memory, train   16 bytes a parameter for weights, gradients and Adam; activations 34 bytes a
                    token, layer and hidden unit in 16 bits (arXiv 2205.05198, without the
                    attention matrix), twice that in 32
    memory, teacher weights, 16 live values a token and hidden unit, and the chunk of the head
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from megadistill.blocks import BlockStore
from megadistill.config import Config, to_yaml
from megadistill.data import files
from megadistill.data.source import count_documents
from megadistill.disk import free_bytes, readable_bytes, used_bytes
from megadistill.errors import MegadistillError
from megadistill.model_files import ModelFiles, find_model

TOKENS_A_DOCUMENT = 1000
BYTES_A_SOURCE_FILE = 17_000  # 11.4 MB in 674 files
_UNPACKED = {".parquet": 2.5, ".gz": 3.5, ".bz2": 4.5, ".xz": 4.5, ".zst": 3.5}
_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
HEAD_CHUNK = 256 << 20  # bytes of logits that the teacher's head works on at a time, about


@dataclass(frozen=True)
class Plan:
    """Numbers are None where they cannot be known. Bytes are on disk."""

    sequences: int | None
    blocks: int | None
    steps: int | None
    token_bytes: int | None
    token_bytes_to_come: int | None
    cache_bytes: int | None
    cache_bytes_to_come: int | None
    run_bytes_to_come: int | None
    teacher_memory: int | None
    student_memory: int | None
    lines: list[tuple[str, str]] = field(default_factory=list)


def show_plan(config: Config, *, world: int | None = None) -> None:
    """Print the resolved configuration and, as comments below it, the plan. On rank 0 only.

    The output is itself a configuration file.
    """
    if int(os.environ.get("RANK", 0)) != 0:
        return
    world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
    plan = make_plan(config, world=world)
    width = max(len(name) for name, _ in plan.lines)
    comments = "".join(f"#   {name:<{width}}  {said}\n" for name, said in plan.lines)
    sys.stdout.write(f"{to_yaml(config)}\n# The plan, on {world} rank(s):\n{comments}")
    sys.stdout.flush()


def make_plan(config: Config, *, world: int) -> Plan:
    """The plan of generating and training by `config` on `world` ranks."""
    teacher = _local_model(config, "teacher")
    student = _local_model(config, "student")
    sequences, how = _sequences(config, teacher)
    blocks = None if sequences is None else math.ceil(sequences / config.data.block_size)
    steps = config.train.steps
    if steps is None and config.train.epochs is not None and sequences is not None:
        steps = max(1, round(config.train.epochs * sequences / config.train.global_batch))
    a_position, most, entries = _bytes_a_position(config, teacher)
    a_sequence = _token_bytes_a_sequence(config)
    token_bytes = None if sequences is None else sequences * a_sequence
    cache_bytes = (
        None
        if sequences is None
        else round(sequences * (a_sequence + a_position * config.data.seq_len))
    )
    run_bytes = _run_bytes(config, student)
    teacher_memory = _teacher_memory(config, teacher, world)
    student_memory = _student_memory(config, student, world)

    lines = [("sequences", f"{_count(sequences)} of {config.data.seq_len} tokens, {how}")]
    if blocks is not None and sequences is not None:
        lines.append(("blocks", f"{_count(blocks)} of {config.data.block_size} sequences"))
    lines += [
        ("token store", _store_line(config.data.dir, token_bytes)),
        ("targets", f"{config.targets.method}, {entries}; {a_position:.1f} bytes a position "
                    f"estimated, {most:.1f} at most"),
        ("cache", _store_line(config.cache.dir, cache_bytes)),
        ("teacher", _model_line(teacher, config.teacher.model, teacher_memory)),
    ]  # fmt: skip
    if config.student is not None:
        per_step = config.train.global_batch * config.data.seq_len
        length = (
            "unknown: train.epochs of an unknown number of sequences"
            if steps is None
            else f"{_count(steps)} of {_count(config.train.global_batch)} sequences, "
            f"{_count(steps * per_step)} tokens"
            + ("" if config.train.steps is not None else ", as the sequences are")
        )
        lines += [
            ("student", _model_line(student, config.student.model, student_memory)),
            ("steps", length),
            ("training run", _store_line(config.train.out_dir, run_bytes)),
        ]
    return Plan(
        sequences=sequences, blocks=blocks, steps=steps,
        token_bytes=token_bytes, token_bytes_to_come=_to_come(token_bytes, config.data.dir),
        cache_bytes=cache_bytes, cache_bytes_to_come=_to_come(cache_bytes, config.cache.dir),
        run_bytes_to_come=run_bytes,
        teacher_memory=teacher_memory, student_memory=student_memory, lines=lines,
    )  # fmt: skip


def _sequences(config: Config, teacher: ModelFiles | None) -> tuple[int | None, str]:
    """(number of sequences, how it is known)."""
    for folder in (config.data.dir, config.cache.dir):
        planned = _planned(folder)
        if planned is not None:
            return planned, f"known: {folder} is planned"
    tokens, how = _tokens(config, teacher)
    return (None if tokens is None else max(1, round(tokens / config.data.seq_len))), how


def _planned(folder: str) -> int | None:
    try:
        return BlockStore.open(folder).num_sequences
    except MegadistillError:
        return None


def _tokens(config: Config, teacher: ModelFiles | None) -> tuple[float | None, str]:
    data = config.data
    vocab = teacher.vocab_size if teacher is not None else None
    a_token = 3.5 if vocab is not None and vocab < 10_000 else 4.2
    by_number = None if data.max_samples is None else float(data.max_samples * TOKENS_A_DOCUMENT)
    try:
        if data.source is not None:
            found = count_documents(data) or 0
            return found * BYTES_A_SOURCE_FILE / a_token, f"estimated from {_count(found)} files"
        if data.files is not None:
            paths = files.find(data.files)
            size = sum(_text_bytes(path) for path in paths)
            tokens = size / a_token
            if by_number is not None and by_number < tokens:
                return by_number, f"estimated from at most {_count(data.max_samples)} documents"
            return tokens, f"estimated from {readable_bytes(size)} of text in {len(paths)} file(s)"
    except MegadistillError as error:
        return None, f"unknown: {error}"
    if by_number is None:
        return None, "unknown: the number of documents is not known before they are read"
    return by_number, (
        f"estimated from at most {_count(data.max_samples)} documents, {TOKENS_A_DOCUMENT} tokens "
        "each"
    )


def _text_bytes(path: str) -> float:
    size = float(Path(path).stat().st_size)
    for suffix in Path(path).suffixes:
        size *= _UNPACKED.get(suffix.lower(), 1)
    return size


def _token_bytes_a_sequence(config: Config) -> int:
    length = config.data.seq_len
    documents = 1 + length // TOKENS_A_DOCUMENT
    masked = config.data.messages_field is not None or config.data.prompt_field is not None
    return 4 * length + 4 * documents + (length if masked else 0) + 40


def _bytes_a_position(config: Config, teacher: ModelFiles | None) -> tuple[float, float, str]:
    """(bytes of the targets column, estimated; at most; what is kept in words)."""
    targets = config.targets
    vocab = (teacher.vocab_size if teacher is not None else None) or 1 << 17
    an_id = 2 if vocab <= 1 << 16 else 3 if vocab <= 1 << 24 else 4
    if targets.method == "multinomial":
        # Measured on a teacher of 1.9 nats: 11 different ids in 50 draws.
        different, draws = 1.6 * math.sqrt(targets.draws), min(targets.draws, vocab)
        size, most = (1 + 2 + 4 + n * (an_id + 4) for n in (different, float(draws)))
        return size, most, f"{different:.1f} entries a position estimated, {draws} at most"
    if targets.method == "topp":
        k = min(targets.k, vocab)
        size = 1 + 2 + 4 + (k / 3 + 0.2) * (an_id + 4)
        most = 1 + 2 + 4 + (k + 1.0) * (an_id + 4)
        return size, most, f"at most {k} entries a position and the true id"
    if targets.method == "topk":
        entries = min(targets.k, vocab)
        size = 1 + 2 + 4 + (entries + 0.2) * (an_id + 4)  # the true id now and then, entropy, nll
        return size, size + 0.8 * (an_id + 4), f"{entries} entries a position and the true id"
    expected = min(0.6 / targets.tau + 1, vocab)
    heads = min(0.25 / targets.tau, expected)
    bound = min(1 / targets.tau + 1, vocab)
    size = 2 + 2 + 4 + expected * an_id + heads * 4
    most = 2 + 2 + 4 + bound * (an_id + 4)
    return size, most, f"{expected:.1f} entries a position estimated, {bound:.1f} at most"


# Memory and disk of the models --------------------------------------------------------------------


def _local_model(config: Config, which: str) -> ModelFiles | None:
    section = config.teacher if which == "teacher" else config.student
    if section is None:
        return None
    try:
        return find_model(
            section.model, key=f"{which}.model", revision=section.revision, fetch=False
        )
    except MegadistillError:
        return None


def _teacher_memory(config: Config, model: ModelFiles | None, world: int) -> int | None:
    found = None if model is None else model.parameters()
    if model is None or found is None or not model.hidden_size or not model.layers:
        return None
    parameters, width = found[0], _WIDTH[config.teacher.dtype]
    tokens = config.teacher.micro_batch * config.data.seq_len
    live = tokens * model.hidden_size * 16 * width
    if config.teacher.engine == "zero3":
        weights = parameters * width // world + 2 * parameters * width // model.layers
    else:
        weights = parameters * width // config.teacher.tp
    return weights + live + HEAD_CHUNK


def _student_memory(config: Config, model: ModelFiles | None, world: int) -> int | None:
    found = None if model is None else model.parameters()
    if model is None or found is None or not model.hidden_size or not model.layers:
        return None
    parameters = found[0]
    width = 2 if _half_precision(config) else 4
    zero = config.deepspeed.get("zero_optimization") or {}
    stage = int(zero.get("stage", 3))
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    weights = parameters * width // (world if stage >= 3 else 1)
    gradients = parameters * width // (world if stage >= 2 else 1)
    states = parameters * (12 if width == 2 else 8) // (world if stage >= 1 else 1)
    gathered = 2 * parameters * width // model.layers if stage >= 3 else 0
    tokens = config.train.micro_batch * config.data.seq_len
    activations = tokens * model.layers * model.hidden_size * 17 * width
    return weights + gradients + (0 if offloaded else states) + gathered + activations


def _half_precision(config: Config) -> bool:
    return any((config.deepspeed.get(name) or {}).get("enabled") for name in ("bf16", "fp16"))


def _run_bytes(config: Config, model: ModelFiles | None) -> int | None:
    """Checkpoints (one more than are kept, while it is written) and the exported model."""
    found = None if model is None else model.parameters()
    if found is None:
        return None
    half = _half_precision(config)
    return found[0] * ((config.train.keep + 1) * (14 if half else 12) + (2 if half else 4))


def _to_come(total: int | None, folder: str) -> int | None:
    """Bytes still to be written: by the blocks that are there, where there are some."""
    try:
        store = BlockStore.open(folder)
        done = len(store.committed())
        if store.num_blocks is not None and done:
            return used_bytes(folder) * (store.num_blocks - done) // done
    except MegadistillError:
        pass  # no store yet, or one that is damaged, which is for its reader to say
    return None if total is None else max(0, total - used_bytes(folder))


# Words --------------------------------------------------------------------------------------------


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _store_line(folder: str, size: int | None) -> str:
    there = used_bytes(folder)
    said = "size unknown" if size is None else f"{readable_bytes(size)} estimated"
    already = f", {readable_bytes(there)} are there" if there else ""
    return f"{said}{already}, in {folder}; the disk has {readable_bytes(free_bytes(folder))} free"


def _model_line(model: ModelFiles | None, name: str, memory: int | None) -> str:
    if model is None:
        return f"{name}: size unknown, its files are not on this machine"
    found = model.parameters()
    if found is None:
        return f"{name}: size unknown, its config.json does not tell"
    counted = "counted" if found[1] else "estimated from config.json"
    needs = "" if memory is None else f"; {readable_bytes(memory)} a rank estimated"
    return f"{name}: {found[0]:,} parameters, {counted}{needs}"
