"""Rules that concern more than one key, less those of training (training_rules.py).

Pure: nothing here looks at the disk or at a model.

A rule yields the keys it looked at with its message, so that the loader can leave out the rules
about keys that are already reported as wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from megadistill.config.curves import fractions, values
from megadistill.config.deepspeed_keys import deepspeed_problems
from megadistill.config.ensemble_rules import ENSEMBLES
from megadistill.config.problem import Problem
from megadistill.config.sections import Sections
from megadistill.config.sources import SOURCES
from megadistill.config.training import LossConfig
from megadistill.config.training_rules import TRAINING
from megadistill.errors import ConfigError
from megadistill.storage.disk import is_url
from megadistill.targets import check_divergence, find_method, sparse_method, sparse_names

NO_CORPUS = (
    "no corpus: set one of data.source=python-stdlib, data.files=[...] (local files) or "
    "data.name (a dataset on the hub)"
)
MAX_SHARD_BYTES = 2**32 - 1  # MDS offsets have 32 bits


def worst_bytes_per_position(config: Sections) -> float:
    """The most bytes that a position's targets can take in a cache, in any of its encodings."""
    if not find_method(config.targets.method).cached:
        return 0
    method = sparse_method(config.targets.method)
    return method.largest_bytes(method.read(config.targets))


def largest_block_size(config: Sections) -> int:
    """The most sequences a block that surely stay within the 4 GiB of a shard; 0: not even one."""
    return int(MAX_SHARD_BYTES // _worst_bytes_a_sequence(config))


def _worst_bytes_a_sequence(config: Sections) -> float:
    return config.data.seq_len * (8 + worst_bytes_per_position(config)) + 256


def problems(config: Sections) -> Iterator[Problem]:
    """Every rule that `config` breaks."""
    general = (_source, _packing, _fields, _folders, _teacher, _online, _targets)
    for rule in (*general, *ENSEMBLES, *TRAINING):
        yield from rule(config)
    for path, message in deepspeed_problems(config.deepspeed):
        yield Problem((".".join(("deepspeed", *path)),), message)


def _source(config: Sections) -> Iterator[Problem]:
    data = config.data
    keys = ("data.source", "data.files", "data.name")
    given = [key for key in keys if getattr(data, key.removeprefix("data.")) is not None]
    if not given and not config.may_train_from_cache:
        yield Problem(("data", *keys), NO_CORPUS)
    elif len(given) > 1:
        others = " ".join(f"{key}=null" for key in given[1:])
        yield Problem(
            ("data", *keys),
            f"{' and '.join(given)} are set, expected one corpus: keep one, for example with "
            f"{others}",
        )
    if data.options and (data.source is None or SOURCES.distribution(data.source) is None):
        yield Problem(
            ("data.options", "data.source"),
            f"{', '.join(data.options)} set, which only a data.source of another distribution "
            f"reads, and data.source is {data.source or 'not set'}: remove data.options",
        )
    if data.streaming and data.max_samples is None and not config.stream_is_unbounded:
        online = config.teacher.mode == "online"
        yield Problem(
            ("data.streaming", "data.max_samples", *(("train.steps",) if online else ())),
            "a streamed dataset has no known end (FineWeb holds 15 trillion tokens, years of "
            "tokenising): set data.max_samples to the number of documents to read, for example "
            "data.max_samples=1000000, or data.streaming=false to download a small one whole"
            + (", or train.steps, and as much is read as they need" if online else ""),
        )


def _packing(config: Sections) -> Iterator[Problem]:
    if config.data.packing == "best_fit" and config.data.pack == "concat":
        yield Problem(
            ("data.packing", "data.pack"),
            "best_fit with data.pack=concat, which joins all documents to one text: set "
            "data.packing=in_order, or data.pack=isolate",
        )


def _fields(config: Sections) -> Iterator[Problem]:
    data = config.data
    prompt, completion = data.prompt_field, data.completion_field
    if (prompt is None) != (completion is None):
        there, missing = ("prompt", "completion") if prompt else ("completion", "prompt")
        yield Problem(
            (f"data.{there}_field", f"data.{missing}_field"),
            f"is set without data.{missing}_field: a {there} needs the column of its {missing}; "
            f"set data.{missing}_field too",
        )
    columns = ("messages_field", "prompt_field", "text_field")
    given = [f"data.{name}" for name in columns if getattr(data, name)]
    if len(given) > 1:
        yield Problem(
            tuple(given),
            f"{' and '.join(given)} are set: a document is a chat, a prompt with its completion, "
            "or a text; keep one",
        )
    if data.tools_field is not None and data.text_field is not None:
        yield Problem(
            ("data.tools_field", "data.text_field"),
            "is set with data.text_field: only chats have tools; keep one of them",
        )
    if given and data.source is not None:
        yield Problem(
            (given[0], "data.source"),
            f"{data.source} has no columns: remove {given[0]}, or read data.files or data.name",
        )
    # Without a key the columns are found in the corpus, and may have a loss mask.
    # So may documents of another distribution's source.
    plain = data.text_field or (data.source and SOURCES.distribution(data.source) is None)
    if config.targets.positions == "loss_mask" and plain:
        yield Problem(
            ("targets.positions", "data.messages_field", "data.prompt_field"),
            "loss_mask needs text that is part prompt, part completion: set data.prompt_field and "
            "data.completion_field, or data.messages_field, or targets.positions=all",
        )


def _folders(config: Sections) -> Iterator[Problem]:
    # A store and a run each own their folder: cleaning up in one must not reach into another.
    written = {"data.dir": config.data.dir}
    if isinstance(config.cache.dir, str):
        written["cache.dir"] = config.cache.dir
    if config.eval.files is not None or config.eval.name is not None:
        written["eval (its tokens)"] = f"{config.data.dir}.heldout"
        if isinstance(config.cache.dir, str):
            written["eval (its cache)"] = f"{config.cache.dir}.heldout"
    if config.cache.local_dir is not None:
        written["cache.local_dir"] = config.cache.local_dir
    read: dict[str, str] = {}
    if not isinstance(config.cache.dir, str):
        read |= {f"cache.dir.{i}": source.dir for i, source in enumerate(config.cache.dir)}
    read |= {f"{key}.model": t.model for key, t in config.teacher.members.items() if t.model}
    read |= {f"cache.ensemble.{i}.dir": c.dir for i, c in enumerate(config.cache.ensemble)}
    if config.student is not None:
        written["train.out_dir"] = config.train.out_dir
        read["student.model"] = config.student.model
    if config.data.tokenizer is not None:
        read["data.tokenizer"] = config.data.tokenizer
    written = {key: folder for key, folder in written.items() if not is_url(folder)}
    for i, (target, folder) in enumerate(written.items()):
        clashes = [*_clashes(target, folder, dict(list(written.items())[:i]))]
        clashes += [
            Problem(
                (target, source),
                f"{folder} holds {source} ({name}), which would be written over: set {target} to "
                "another folder",
            )
            for source, name in read.items()
            if _inside(name, folder)
        ]
        yield from clashes[:1]  # one move mends them all


def _clashes(target: str, folder: str, others: dict[str, str]) -> Iterator[Problem]:
    for other, path in others.items():
        within, around = _inside(folder, path), _inside(path, folder)
        if within or around:
            how = "the same folder as" if within and around else "inside" if within else "around"
            yield Problem(
                (target, other),
                f"{folder} is {how} {other} ({path}), and each needs a folder of its own: set "
                f"{target} to another",
            )


def _inside(path: str, folder: str) -> bool:
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _teacher(config: Sections) -> Iterator[Problem]:
    teacher = config.teacher
    if teacher.model is None and not config.may_train_from_cache:
        yield Problem(
            ("teacher.model",), "missing, expected a folder or a hub id: set teacher.model"
        )
    if teacher.engine == "zero3" and teacher.tp > 1:
        yield Problem(
            ("teacher.tp", "teacher.engine"),
            f"{teacher.tp} with teacher.engine=zero3, expected 1: ZeRO-3 spreads the teacher over "
            "all ranks by itself; set teacher.tp=1, or teacher.engine=tensor_parallel",
        )

    if teacher.offload and teacher.engine == "tensor_parallel" and teacher.mode == "cached":
        yield Problem(
            ("teacher.offload", "teacher.engine"),
            f"{teacher.offload} with teacher.engine=tensor_parallel and teacher.mode=cached, where "
            "the teacher is never idle: set teacher.engine=zero3 teacher.tp=1, which fetches a "
            "layer at a time, or leave it out",
        )


def _online(config: Sections) -> Iterator[Problem]:
    targets, loss = config.targets, config.loss
    if config.teacher.mode == "cached":
        if not find_method(targets.method).cached and config.student is None:
            yield not_cached(config)
        if loss.aligned:
            key = f"loss.{loss.aligned[0]}_weight"
            yield Problem(
                (key, "teacher.mode"),
                "aligns the student's layers with the teacher's, which no cache keeps: set "
                f"teacher.mode=online, or {key}=0",
            )
        return
    yield from _attention(config)
    if config.student is None:
        yield Problem(
            ("teacher.mode", "student"),
            "online runs the teacher together with a student, and there is none: set "
            "student.model, or teacher.mode=cached to generate a cache",
        )
    elif not loss.learns_from_teacher and not loss.aligned:
        yield Problem(
            ("teacher.mode", "loss.kd_weight", "loss.hidden_weight", "loss.attention_weight"),
            "online with loss.kd_weight=0: the teacher would answer and nobody listen; set "
            "loss.kd_weight=1, or teacher.mode=cached and cache.dir to the token store "
            f"({config.data.dir})",
        )
    cached = find_method(targets.method).cached
    if not cached and targets.positions == "entropy":
        yield Problem(
            ("targets.positions", "targets.method"),
            f"entropy with targets.method={targets.method}, which compares all positions: set "
            "targets.positions=all, or a method that lists ids",
        )
    if not cached and targets.temperature != 1:
        yield Problem(
            ("targets.temperature", "targets.method"),
            f"{targets.temperature:g} with targets.method={targets.method}, which has nothing made "
            "beforehand: set loss.temperature, which softens both sides, and leave this one out",
        )


def _attention(config: Sections) -> Iterator[Problem]:
    if config.student is None or "attention" not in config.loss.aligned:
        return
    for part, section in (("teacher", config.teacher), ("student", config.student)):
        if section.attention != "eager":
            key = f"{part}.attention"
            yield Problem(
                (key, "loss.attention_weight"),
                f"{section.attention} gives no attention weights to align, expected eager: set "
                f"{key}=eager, or loss.attention_weight=0",
            )


def _targets(config: Sections) -> Iterator[Problem]:
    targets, loss, data = config.targets, config.loss, config.data
    online = config.teacher.mode == "online"
    try:
        find_method(targets.method).read(targets)
    except ValueError as error:
        yield Problem(("targets.options", "targets.method"), str(error))
        return
    worst, fits = _worst_bytes_a_sequence(config), largest_block_size(config)
    if data.block_size > fits and not online:
        advice = f"set data.block_size to {fits} or less" if fits else "make data.seq_len smaller"
        yield Problem(
            (
                "data.block_size",
                "data.seq_len",
                "targets.method",
                *(f"targets.{name}" for name in find_method(targets.method).keys),
            ),
            f"a block of {data.block_size} sequences of {data.seq_len} tokens can take "
            f"{data.block_size * worst / 2**30:.1f} GiB, expected less than the 4 GiB of a shard: "
            f"{advice}",
        )
    if (targets.min_entropy is not None) != (targets.positions == "entropy"):
        yield Problem(
            ("targets.min_entropy", "targets.positions"),
            f"is read with targets.positions=entropy only, and positions is "
            f"{targets.positions or 'not set'}: "
            "remove it, or set targets.positions=entropy"
            if targets.min_entropy is not None
            else "targets.positions=entropy leaves out positions below it: set it, in nats, for "
            "example targets.min_entropy=0.5",
        )
    if config.student is None:
        return
    if online:  # a cache knows how it was made, and is asked when it is opened
        yield from divergence_problems(config)
    else:  # what no cache can serve
        yield from divergence_problems(config, anything=True)
    yield from _loss(loss)


def not_cached(config: Sections) -> Problem:
    """A method whose targets exist only while the teacher runs."""
    return Problem(
        ("targets.method", "teacher.mode"),
        f"{config.targets.method} compares whole distributions, which no cache keeps: set "
        "teacher.mode=online, or targets.method to one of "
        f"{', '.join(sparse_names())}",
    )


def divergence_problems(config: Sections, *, anything: bool = False) -> Iterator[Problem]:
    """Whether the targets of the configuration serve its loss; with `anything`, whether any do."""
    targets, loss = config.targets, config.loss
    try:
        for temperature in values(loss.temperature):
            check_divergence(
                "topk" if anything else targets.method,
                loss.divergence,
                kd_temperature=temperature,
                made_at=targets.temperature,
                ground_truth_residual=loss.ground_truth_residual,
            )
    except ConfigError as error:
        key, _, message = str(error).partition(": ")
        keys = (key, "loss.divergence", "targets.method", "targets.temperature")
        yield Problem(tuple(dict.fromkeys(keys)), message)


def _loss(loss: LossConfig) -> Iterator[Problem]:
    weights = ("kd_weight", "ce_weight", "hidden_weight", "attention_weight")
    bends = {0.0, *(f for name in weights for f in fractions(getattr(loss, name)))} - {1.0}
    idle = [done for done in sorted(bends) if not any(getattr(loss.at(done), w) for w in weights)]
    if idle:
        when = f" at {idle[0]:g} of the run" if loss.changes else ""
        yield Problem(
            ("loss", *(f"loss.{name}" for name in weights)),
            f"kd_weight and ce_weight are both 0{when}, so there is nothing to minimise: set "
            "loss.kd_weight=1 to learn from the teacher, loss.ce_weight=1 from the text",
        )
    if loss.curriculum and (not any(values(loss.ce_weight)) or isinstance(loss.ce_weight, tuple)):
        yield Problem(
            ("loss.curriculum", "loss.ce_weight"),
            f"{loss.curriculum} with loss.ce_weight={loss.ce_weight}, expected a number above 0, "
            "its weight in the last phase: set it, or set loss.curriculum=null",
        )
