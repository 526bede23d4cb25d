"""What can be known to be wrong before a model is loaded, or a byte is written.

A run that fails for a reason that was plain at its start, after an hour of loading, costs the hour
on every GPU. So the configuration is held against the files of the models, the tokenizers, the
corpus, the folders, the disk and the number of ranks first, and all mistakes are reported at once.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megadistill.blocks.layout import KINDS, kind_of
from megadistill.config import Config, StudentConfig, TeacherConfig
from megadistill.disk import check_disk
from megadistill.errors import ConfigError, MegadistillError
from megadistill.model_files import ModelFiles, find_model, first_line, hub_file_names
from megadistill.plan import Plan, make_plan

log = logging.getLogger(__name__)

_RUN_ENTRIES = {"metrics.jsonl", "checkpoints", "model"}


def check_generate(config: Config, *, world: int) -> None:
    """Refuse what would fail `launch/generate.py` on `world` ranks: ConfigError, a line each.

    The student is looked at too where it can be found: a vocabulary that does not fit should be
    known before the teacher has run for days.
    """
    found = _Mistakes()
    found.of(_layout, config, world)
    found.of(_corpus, config)
    found.of(_store_folder, config.data.dir, "data.dir", "tokens")
    found.of(_store_folder, config.cache.dir, "cache.dir", "cache")
    teacher = found.of(_model, config.teacher, "teacher.model", with_weights=True)
    if teacher is not None:
        found.of(_fits, config, teacher)
        found.of(_heads, config, teacher)
    tokenizer = found.of(_tokenizer, config)
    if teacher is not None and tokenizer is not None:
        found.of(_tokenizer_fits, config, tokenizer, teacher)
    student = _student_if_there(config)
    if student is not None:
        found.of(_same_vocabulary, config, tokenizer, teacher, student)
        found.of(_fits, config, student)
    found.of(_disk, config, make_plan(config, world=world), training=False)
    found.raise_all()


def check_train(config: Config, *, world: int) -> None:
    """Refuse what would fail `launch/train.py` on `world` ranks: ConfigError, a line each.

    The teacher is not needed to train from a cache; it is compared where it can be found.
    """
    if config.student is None:
        raise ConfigError(
            "student: there is nothing to train: add the section, with student.model a folder or "
            "a hub id"
        )
    found = _Mistakes()
    found.of(_cache_to_train_from, config)
    found.of(_run_folder, config)
    with_weights = config.student.init == "pretrained"
    student = found.of(_model, config.student, "student.model", with_weights=with_weights)
    if student is not None:
        found.of(_fits, config, student)
        try:
            teacher = _find(config.teacher, "teacher.model", fetch=False)
        except ConfigError:
            teacher = None  # the cache's recipe says what it was made with
        if teacher is not None:
            tokenizer = _tokenizer_if_there(config)
            found.of(_same_vocabulary, config, tokenizer, teacher, student)
    found.of(_disk, config, make_plan(config, world=world), training=True)
    found.raise_all()


class _Mistakes:
    """The mistakes so far, one line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def of(self, check: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What `check` returns; None, and its mistake noted, where it raises one of ours."""
        try:
            return check(*args, **options)
        except MegadistillError as error:
            self.lines += str(error).splitlines()
            return None

    def raise_all(self) -> None:
        if self.lines:
            raise ConfigError("\n".join(dict.fromkeys(self.lines)))


# Ranks and models ---------------------------------------------------------------------------------


def _layout(config: Config, world: int) -> None:
    from megadistill.parallel import check_layout

    check_layout(tp=config.teacher.tp, world=world)


def _find(section: TeacherConfig | StudentConfig, key: str, *, fetch: bool = True) -> ModelFiles:
    return find_model(section.model, key=key, revision=section.revision, fetch=fetch)


def _model(section: TeacherConfig | StudentConfig, key: str, *, with_weights: bool) -> ModelFiles:
    model = _find(section, key)
    _causal(model, trusted=section.trust_remote_code)
    if with_weights:
        _safetensors(model)
    if section.attention == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        part = key.partition(".")[0]
        raise ConfigError(
            f"{part}.attention: flash_attention_2 needs the package flash-attn, which is not "
            f"installed: install it, or set {part}.attention=sdpa"
        )
    return model


def _causal(model: ModelFiles, *, trusted: bool) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own_code = "AutoModelForCausalLM" in (model.settings.get("auto_map") or {})
    if own_code and trusted:
        return
    key = model.key.partition(".")[0]
    kind, classes = model.settings.get("model_type"), model.settings.get("architectures") or []
    known: set[str] = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update([name] if isinstance(name, str) else name)
    if classes and known.intersection(classes):
        return
    if not classes and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if own_code:
        raise ConfigError(
            f"{model.key}: {model.name} brings code of its own, which is not run unless you say "
            f"so: read it, and set {key}.trust_remote_code=true"
        )
    what = ", ".join(classes) if classes else f"model_type {kind!r}"
    raise ConfigError(
        f"{model.key}: {model.name} is no causal language model: its config.json says {what}, "
        "expected one that AutoModelForCausalLM loads, such as LlamaForCausalLM"
    )


def _safetensors(model: ModelFiles) -> None:
    names = hub_file_names(model) if model.on_hub else None
    if names is None and model.on_hub and not model.weights() and not model.other_weights():
        return  # offline, and not downloaded: loading will say so
    if names is not None:
        if any(name.endswith(".safetensors") for name in names):
            return
        others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    elif model.weights():
        return
    else:
        others = model.other_weights()
    if others:
        raise ConfigError(
            f"{model.key}: {model.name} has its weights as {others[0]}, which can run code when it "
            "is read, expected safetensors: load and save_pretrained it once where you trust it"
        )
    hint = ", or set student.init=random" if model.key == "student.model" else ""
    raise ConfigError(
        f"{model.key}: {model.name} holds no weights, expected *.safetensors beside config.json"
        f"{hint}"
    )


def _fits(config: Config, model: ModelFiles) -> None:
    longest = model.max_positions
    if longest is not None and config.data.seq_len > longest:
        raise ConfigError(
            f"data.seq_len: {config.data.seq_len} is beyond the {longest} positions of "
            f"{model.key} ({model.name}): set data.seq_len to {longest} or less"
        )


def _heads(config: Config, teacher: ModelFiles) -> None:
    tp = config.teacher.tp
    for what, count in (("attention heads", teacher.heads), ("key-value heads", teacher.kv_heads)):
        if count is not None and count % tp:
            fitting = [t for t in range(1, count + 1) if not count % t and not
                       (teacher.heads or count) % t]  # fmt: skip
            raise ConfigError(
                f"teacher.tp: {tp} does not divide the {count} {what} of {teacher.name}: set it to "
                f"one of {', '.join(map(str, fitting))}, or use teacher.engine=zero3 with "
                "teacher.tp=1"
            )


# Tokenizers and vocabularies ----------------------------------------------------------------------


def _tokenizer(config: Config) -> Any:
    from megadistill.data.tokenizer import load_tokenizer

    return load_tokenizer(config)


def _tokenizer_if_there(config: Config) -> Any:
    try:
        return _tokenizer(config)
    except ConfigError:
        return None


def _tokenizer_fits(config: Config, tokenizer: Any, teacher: ModelFiles) -> None:
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if teacher.vocab_size is not None and largest >= teacher.vocab_size:
        key = "teacher.model" if config.data.tokenizer is None else "data.tokenizer"
        raise ConfigError(
            f"{key}: the tokenizer {config.data.tokenizer or config.teacher.model} has ids up to "
            f"{largest}, and the teacher {teacher.name} a vocabulary of {teacher.vocab_size}: they "
            "do not belong together; set data.tokenizer to the teacher's own"
        )


def _student_if_there(config: Config) -> ModelFiles | None:
    if config.student is None:
        return None
    try:
        return _find(config.student, "student.model", fetch=False)
    except ConfigError as error:
        log.warning("the student is not compared with the teacher yet: %s", error)
        return None


def _same_vocabulary(
    config: Config, tokenizer: Any, teacher: ModelFiles | None, student: ModelFiles
) -> None:
    if teacher is not None and teacher.vocab_size != student.vocab_size:
        raise ConfigError(
            f"student.model: {student.name} has a vocabulary of {student.vocab_size}, the teacher "
            f"{teacher.name} one of {teacher.vocab_size}, and a target is about ids: choose a "
            "student of the same family, or one with student.init=random and that vocab_size in "
            "its config.json"
        )
    if tokenizer is None or config.student is None:
        return
    own = _tokenizer_of(config.student, student)
    if own is None:
        return
    from megadistill.data.tokenizer import tokenizer_identity

    ours, theirs = (tokenizer_identity(t, chat=False)["content"] for t in (tokenizer, own))
    if ours != theirs:
        text = _example_of_difference(tokenizer, own)
        raise ConfigError(
            f"student.model: the tokenizer of {student.name} turns text into other ids than "
            f"{config.data.tokenizer or config.teacher.model} does{text}: the student would learn "
            "from targets that are about other tokens; give it the teacher's tokenizer"
        )


def _tokenizer_of(student: StudentConfig, files: ModelFiles) -> Any:
    """The student's own tokenizer, or None where it has none (a config.json alone)."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not files.on_hub and not any((files.folder / name).is_file() for name in names):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            student.model, revision=student.revision, trust_remote_code=student.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - whatever a tokenizer's own code may raise
        raise ConfigError(
            f"student.model: {student.model}: its tokenizer cannot be loaded: {first_line(error)}"
        ) from None
    return tokenizer if tokenizer.is_fast else None


def _example_of_difference(ours: Any, theirs: Any) -> str:
    ours, theirs = ours.get_vocab(), theirs.get_vocab()
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            other = theirs.get(token, "nothing")
            return f" ({token!r} is {number} in the one and {other} in the other)"
    return ""


# Folders, corpus, disk ----------------------------------------------------------------------------


def _corpus(config: Config) -> None:
    if config.data.files is not None:
        from megadistill.data import files

        files.kind(files.find(config.data.files))


def _store_folder(path: str, key: str, kind: str) -> None:
    folder = Path(path)
    _can_be_written(folder, key)
    if not folder.is_dir():
        return
    found = kind_of(folder)
    others = _entries(folder, besides={"ids.bin", "blocks"})
    if found not in (None, kind):
        raise ConfigError(f"{key}: {path} holds a store of kind {found}: choose another folder")
    if found is None and others:
        raise ConfigError(
            f"{key}: {path} holds something else ({_some(others)}) and no {KINDS[kind]}: choose "
            "an empty folder, or one that is not there yet"
        )


def _run_folder(config: Config) -> None:
    folder = Path(config.train.out_dir)
    _can_be_written(folder, "train.out_dir")
    others = _entries(folder) if folder.is_dir() else []
    if others and not _RUN_ENTRIES.intersection(others):
        raise ConfigError(
            f"train.out_dir: {folder} holds something else ({_some(others)}) and no training run: "
            "choose an empty folder, or one that is not there yet"
        )


def _cache_to_train_from(config: Config) -> None:
    path = config.cache.dir
    if not Path(path).is_dir():
        raise ConfigError(
            f"cache.dir: {path} does not exist, expected a cache: make it with launch/generate.py "
            "and the same configuration"
        )
    if kind_of(Path(path)) != "cache":
        raise ConfigError(
            f"cache.dir: {path} holds no {KINDS['cache']}, expected a cache: make it with "
            "launch/generate.py, or set cache.dir to where it is"
        )


def _entries(folder: Path, *, besides: set[str] | None = None) -> list[str]:
    return sorted(set(os.listdir(folder)) - (besides or set()))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if names[2:] else ""
    return ", ".join(names[:2]) + more


def _can_be_written(folder: Path, key: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{key}: {folder} is a file, expected a folder: choose another place")
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{key}: {folder} would lie in {nearest}, which is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {nearest} cannot be written to: choose another folder")


def _disk(config: Config, plan: Plan, *, training: bool) -> None:
    for key, path, needed in _needs(config, plan, training=training):
        if needed is not None:
            check_disk(path, needed, key=key, reserve=int(config.cache.min_free * 2**30))


def _needs(config: Config, plan: Plan, *, training: bool) -> Iterator[tuple[str, str, int | None]]:
    """(key, folder, bytes still to come) for each disk, stores on one disk added up."""
    if training:
        yield "train.out_dir", config.train.out_dir, plan.run_bytes_to_come
        return
    first, second = plan.token_bytes_to_come, plan.cache_bytes_to_come
    if first is not None and second is not None:
        from megadistill.disk import device_of

        if device_of(config.data.dir) == device_of(config.cache.dir):
            yield "cache.dir", config.cache.dir, first + second
            return
    yield "data.dir", config.data.dir, first
    yield "cache.dir", config.cache.dir, second
