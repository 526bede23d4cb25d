"""Estimate of a run: sequences, blocks, bytes, memory, steps. For --dry_run and the disk's check.

Nothing is loaded and nothing is fetched. What is known is said to be known (an existing store
counts its sequences itself), what is worked out from assumptions is said to be estimated: see
`assumptions` and `memory`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from dataclasses import dataclass, field

from megadistill.blocks import open_store
from megadistill.blocks.remote.object_store import shown
from megadistill.config import Config, StudentConfig, TeacherConfig, write_yaml
from megadistill.config.held_out import held_out
from megadistill.errors import MegadistillError
from megadistill.models.model_files import ModelFiles, find_model
from megadistill.preflight.plan import assumptions, corpus_size
from megadistill.preflight.plan.memory import at_once, run_bytes, student_memory, teacher_memory
from megadistill.storage.disk import free_bytes, readable_bytes, used_bytes
from megadistill.targets import find_method

log = logging.getLogger(__name__)


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
    """Print the plan, as comments, and below it the keys that differ from the defaults.

    The output is itself a configuration file. On rank 0 only.
    """
    if int(os.environ.get("RANK", 0)) != 0:
        return
    world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
    plan = make_plan(config, world=world)
    width = max(len(name) for name, _ in plan.lines)
    comments = "".join(f"#   {name:<{width}}  {said}\n" for name, said in plan.lines)
    changed = write_yaml(config.model_dump(mode="json", exclude_defaults=True))
    sys.stdout.write(
        f"# The plan, on {world} rank(s):\n{comments}\n"
        f"# Keys that differ from their defaults:\n{changed}"
    )
    sys.stdout.flush()


def log_plan(plan: Plan) -> None:
    """The plan as lines of the log: what generating prints before it begins."""
    width = max(len(name) for name, _ in plan.lines)
    for name, said in plan.lines:
        log.info("plan: %-*s  %s", width, name, said)


def make_plan(config: Config, *, world: int, training: bool = True) -> Plan:
    """The plan of generating, and of training with `training`, by `config` on `world` ranks."""
    teacher = _local_model(config.teacher, "teacher.model")
    vocab_size = teacher.vocab_size if teacher is not None else None
    sequences, how = corpus_size.sequences(config, vocab_size=vocab_size)
    blocks = None if sequences is None else math.ceil(sequences / config.data.block_size)
    online = config.teacher.mode == "online"
    kept = not online and find_method(config.targets.method).cached
    a_position = assumptions.position(config.targets, vocab_size=vocab_size) if kept else None
    a_sequence = token_store_bytes(config)
    token_bytes = None if sequences is None else sequences * a_sequence
    cache_bytes = (
        None
        if sequences is None or a_position is None
        else round(
            sequences
            * (
                a_sequence
                + a_position.bytes * corpus_size.target_share(config) * config.data.seq_len
            )
        )
    )
    index, parts = config.cache.part_index
    part_blocks = None if blocks is None else len(range(index, blocks, parts))
    part_bytes = (
        None
        if cache_bytes is None or blocks is None or part_blocks is None
        else cache_bytes * part_blocks // blocks
    )
    memory, teacher_lines = _teachers(config, world)
    lines = [("sequences", f"{_count(sequences)} of {config.data.seq_len} tokens, {how}")]
    if blocks is not None:
        lines.append(("blocks", f"{_count(blocks)} of {config.data.block_size} sequences"))
    lines += [
        ("token store", _store_line(config.data.dir, token_bytes)),
        ("targets", _targets_line(config, a_position)),
        *([] if online else _cache_lines(config, part_bytes)),
        *_held_out_lines(config),
        *teacher_lines,
    ]
    student = _local_model(config.student, "student.model")
    steps, run = _steps(config, sequences), run_bytes(config, student)
    student_needs = student_memory(config, student, world)
    if config.student is not None and training:
        lines += [
            ("student", _model_line(student, config.student.model, student_needs)),
            ("steps", _steps_line(config, steps)),
            ("training run", _store_line(config.train.out_dir, run)),
        ]
    return Plan(
        sequences=sequences,
        blocks=blocks,
        steps=steps,
        token_bytes=token_bytes,
        token_bytes_to_come=_to_come(token_bytes, config.data.dir, blocks),
        cache_bytes=cache_bytes,
        cache_bytes_to_come=_to_come(part_bytes, config.cache.folder, part_blocks)
        if config.cache.is_folder and not online
        else None,
        run_bytes_to_come=run,
        teacher_memory=memory,
        student_memory=student_needs,
        lines=lines,
    )


def token_store_bytes(config: Config) -> int:
    """Bytes of a sequence in the token store, which the cache holds again."""
    masked = corpus_size.has_loss_mask(config.data)
    return assumptions.token_store_bytes_a_sequence(config.data.seq_len, masked=masked)


def _steps(config: Config, sequences: int | None) -> int | None:
    train = config.train
    if train.steps is not None or train.epochs is None or sequences is None:
        return train.steps
    return max(1, round(train.epochs * sequences / train.global_batch))


def _targets_line(config: Config, a_position: assumptions.Position | None) -> str:
    if a_position is None:
        return f"{config.targets.method}, from the online teacher; nothing is kept"
    return (
        f"{config.targets.method}, {a_position.entries:.1f} entries per token estimated, "
        f"{a_position.most_entries:.0f} at most; {a_position.bytes:.1f} bytes per token "
        f"estimated, {a_position.most_bytes:.1f} at most"
    )


def _cache_lines(config: Config, size: int | None) -> list[tuple[str, str]]:
    if config.cache.is_folder:
        name = "cache" if config.cache.part is None else f"cache, part {config.cache.part}"
        return [(name, _store_line(config.cache.folder, size)), *_ensemble_lines(config)]
    return [
        ("cache", f"{shown(source.dir)}, to train from, weight {source.weight:g}")
        for source in config.cache.sources
    ] + _ensemble_lines(config)


def _held_out_lines(config: Config) -> list[tuple[str, str]]:
    made = held_out(config)
    if made is None:
        return []
    text = made.data.name or ", ".join(made.data.files or [])
    return [("held-out cache", f"topk, k {made.targets.k}, of {text}, in {made.cache.dir}")]


def _ensemble_lines(config: Config) -> list[tuple[str, str]]:
    return [
        ("cache", f"{shown(c.dir)}, another teacher's to train from, weight {c.weight:g}")
        for c in config.cache.ensemble
    ]


def _teachers(config: Config, world: int) -> tuple[int | None, list[tuple[str, str]]]:
    """Bytes a rank of all teachers together, None where one is not known; a line of each."""
    sizes, lines = [], []
    for key, each in config.of_each_teacher.items():
        if each.teacher.model is None:  # a cache is trained from
            continue
        model = _local_model(each.teacher, f"{key}.model")
        memory = teacher_memory(each, model, world)
        lines.append(("teacher", _model_line(model, each.teacher.model, memory)))
        sizes.append((each, memory))
    known = [(each, memory) for each, memory in sizes if memory is not None]
    return at_once(known) if len(known) == len(sizes) else None, lines


def _local_model(section: TeacherConfig | StudentConfig | None, key: str) -> ModelFiles | None:
    if section is None:
        return None
    try:
        return find_model(section.model, key=key, revision=section.revision, fetch=False)
    except MegadistillError:
        return None


def _to_come(total: int | None, folder: str, blocks: int | None) -> int | None:
    """Bytes still to be written: by the blocks that are there, where there are some."""
    there = _there(folder)
    with contextlib.suppress(MegadistillError):  # no store yet, or a damaged one
        done = len(open_store(folder).committed())
        if blocks is not None and done:
            return there * max(0, blocks - done) // done
    return None if total is None else max(0, total - there)


def _there(folder: str) -> int:
    """Bytes of a store that are on the disk: shards, derived files, markers."""
    return used_bytes(folder) + used_bytes(os.path.join(folder, "blocks"))


# Words --------------------------------------------------------------------------------------------


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _store_line(folder: str, size: int | None) -> str:
    there = _there(folder)
    said = "size unknown" if size is None else f"{readable_bytes(size)} estimated"
    already = f", {readable_bytes(there)} are there" if there else ""
    return f"{said}{already}, in {folder}; the disk has {readable_bytes(free_bytes(folder))} free"


def _steps_line(config: Config, steps: int | None) -> str:
    if steps is None:
        return "unknown: train.epochs of an unknown number of sequences"
    train, why = config.train, "" if config.train.steps is not None else ", as the sequences are"
    tokens = corpus_size.tokens(config.data, steps * train.global_batch)
    return (
        f"{_count(steps)} of {_count(train.global_batch)} sequences, {_count(tokens)} tokens{why}"
    )


def _model_line(model: ModelFiles | None, name: str, memory: int | None) -> str:
    if model is None:
        return f"{name}: size unknown, its files are not on this machine"
    found = model.parameters()
    if found is None:
        return f"{name}: size unknown, its config.json does not tell"
    counted = "counted" if found[1] else "estimated from config.json"
    needs = "" if memory is None else f"; {readable_bytes(memory)} a rank estimated"
    return f"{name}: {found[0]:,} parameters, {counted}{needs}"
