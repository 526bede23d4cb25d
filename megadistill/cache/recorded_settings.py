"""Settings recorded in a cache, and how a configuration is compared with them.

A cache was made with a method, its parameters and a temperature, from sequences of one length, in
one tokenizer's ids, by one teacher. Training reads all of it from the cache:

- the method, its parameters and the temperature always hold; other `targets.*` are reported in one
  line. They may stand there for generating something else.
- sequence length, packing, tokenizer and teacher are compared where the configuration sets them,
  and a difference is refused: another cache is meant than the one that is named.

Every cache of `cache.ensemble` and of a list has a teacher of its own, so that `teacher.model` is
compared with a single cache only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from megadistill.blocks import BlockReader, open_store
from megadistill.cache.cache_recipe import adapter_folder, config_hash, model_identity
from megadistill.cache.recorded_method import require_installed
from megadistill.config import Config
from megadistill.config.curves import values
from megadistill.config.schema import with_temperature
from megadistill.data.names import shown_name
from megadistill.data.tokenizer import open_tokenizer, tokenizer_identity
from megadistill.errors import ConfigError, MegadistillError, StoreError
from megadistill.models.model_files import ModelFiles, find_model, may_be_hub_id
from megadistill.storage.disk import is_url
from megadistill.targets import check_divergence, find_method, is_sparse

log = logging.getLogger(__name__)

# Of a recipe, what the section `targets` would say.
_TARGETS = ("temperature", "positions", "min_entropy", "seed", "entropy", "nll")
_WAY_OUT = "or name the cache that is meant in cache.dir"


def with_known(config: Config, store: BlockReader) -> Config:
    """The configuration with what the store knows in place of defaults and of other `targets`."""
    recipe = store.recipe
    data: dict[str, Any] = {"seq_len": int(recipe["seq_len"])}
    pack = pack_of(recipe)
    if pack is not None and "pack" not in config.data.model_fields_set:
        data["pack"] = pack
    update: dict[str, Any] = {"data": _updated(config.data, data)}
    method = recipe.get("method")
    if isinstance(method, str) and is_sparse(method):
        names = (*_keys(method), *_TARGETS)
        known = {name: recipe[name] for name in names if name in recipe}
        update["targets"] = _updated(config.targets, {"method": method, **known})
        if "temperature" not in config.loss.model_fields_set and "temperature" in recipe:
            update["loss"] = with_temperature(config.loss, recipe["temperature"])
    return config.model_copy(update=update)


def _keys(method: str) -> tuple[str, ...]:
    """The keys of `targets`, and fields of a recipe, that hold the method's parameters."""
    return find_method(method).keys


def pack_of(recipe: dict[str, Any]) -> str | None:
    """Returns "isolate" or "concat", how documents are packed; None if the recipe does not say."""
    pack = recipe.get("pack") or (recipe.get("tokens") or {}).get("pack")
    return pack if pack in ("isolate", "concat") else None


def with_local_known(config: Config) -> Config:
    """`with_known` of the first cache, where it lies on this machine and can be read."""
    store = local_store(config)
    return config if store is None else with_known(config, store)


def local_store(config: Config) -> BlockReader | None:
    """The first store of `cache.dir`; None for a URL, one that is not there, or online."""
    path = config.cache.sources[0].dir
    if config.student is None or config.teacher.mode == "online" or is_url(path):
        return None
    try:
        return open_store(path)
    except MegadistillError:  # which the check of the folder reports
        return None


def check_known(config: Config, stores: list[BlockReader], *, contents: bool = True) -> None:
    """ConfigError, a line each, for set keys that contradict the stores of `cache.dir`.

    contents: whether to read the teacher's weights, which takes seconds a GB on a slow disk.
    """
    lines = [line for store in stores for line in _contradictions(config, store)]
    if len(stores) == 1:
        lines += _other_teacher(config, stores[0], contents=contents)
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))


def check_targets(config: Config, recipe: dict[str, Any], *, name: str, key: str) -> None:
    """ConfigError where the targets of a cache cannot serve the loss at any time of the run.

    key: where the configuration names it.
    """
    try:
        require_installed(recipe, where=name)
    except StoreError as error:
        raise ConfigError(f"{key}: {error}") from None
    try:
        for temperature in values(config.loss.temperature):
            check_divergence(
                recipe["method"],
                config.loss.divergence,
                kd_temperature=temperature,
                made_at=recipe["temperature"],
                ground_truth_residual=config.loss.ground_truth_residual,
            )
    except ConfigError as error:
        place = f"{key}: {name}: " if key.startswith("cache.ensemble") else ""
        raise ConfigError(f"{place}{error} ({name} holds {recipe['method']} targets)") from None


def other_targets(config: Config, store: BlockReader) -> str | None:
    """A line about `targets` of the configuration that do not hold for the cache; None without."""
    recipe, targets = store.recipe, config.targets
    method = recipe.get("method")
    if not isinstance(method, str) or not is_sparse(method):
        return None
    # A parameter of another method says nothing more than the method does.
    names = ["method", *_keys(method), *_TARGETS]
    said = {name: getattr(targets, name) for name in names}
    if targets.method == method:
        chosen = find_method(method)
        said |= chosen.record(chosen.read(targets))
    other = [
        name
        for name in names
        if name in targets.model_fields_set
        and name in recipe
        and said[name] is not None
        and said[name] != recipe[name]
    ]
    if not other:
        return None
    held = ["method", *_keys(method), *(name for name in other if name in _TARGETS)]
    holds = ", ".join(f"{name} {recipe[name]}" for name in held if name in recipe)
    ignored = " ".join(f"targets.{name}={said[name]}" for name in other)
    return f"{store.name} was made with {holds}, which holds here; {ignored} is for generating"


def _contradictions(config: Config, store: BlockReader) -> Iterator[str]:
    data, recipe = config.data, store.recipe
    seq_len = int(recipe["seq_len"])
    if "seq_len" in data.model_fields_set and data.seq_len != seq_len:
        yield (
            f"data.seq_len: {data.seq_len}, and {store.name} has sequences of {seq_len}: set "
            f"data.seq_len={seq_len}, or leave it out, {_WAY_OUT}"
        )
    pack = pack_of(recipe)
    # Of text alone, without a teacher, both ways are open.
    taught = store.kind == "cache" and config.loss.learns_from_teacher
    if taught and "pack" in data.model_fields_set and pack not in (None, data.pack):
        yield (
            f"data.pack: {data.pack}, and the teacher of {store.name} read its sequences with "
            f"{pack}: set data.pack={pack}, or leave it out, {_WAY_OUT}"
        )
    if data.tokenizer is None or "tokenizer" not in recipe:
        return
    own, stored = _content(config), recipe["tokenizer"]["content"]
    if own not in (None, stored):
        called = store.names.get("data.tokenizer")
        yield (
            f"data.tokenizer: {shown_name(data.tokenizer)} ({own[:16]}) is not the tokenizer of "
            f"{store.name}, {f'{called} ' if called else ''}({stored[:16]}): set data.tokenizer to "
            f"that one, or leave it out, {_WAY_OUT}"
        )


def _content(config: Config) -> Any:
    """The content hash of data.tokenizer; None where it cannot be loaded on this machine."""
    try:
        tokenizer = open_tokenizer(
            config.data.tokenizer,
            key="data.tokenizer",
            trust_remote_code=config.teacher.trust_remote_code,
        )
    except ConfigError:
        return None
    return tokenizer_identity(tokenizer)["content"]


def _other_teacher(config: Config, store: BlockReader, *, contents: bool) -> Iterator[str]:
    """A line where teacher.model is another model than the one that made the cache."""
    name, made_by = config.teacher.model, store.recipe.get("teacher")
    if name is None or not isinstance(made_by, dict):
        return
    called = store.names.get("teacher.model")
    found = _differs(config, made_by, contents=contents)
    if found is None:  # its files are not on this machine
        both = called is not None and may_be_hub_id(name) and "/" in name and "/" in called
        found = "another name" if both and called != shown_name(name) else ""
    if found:
        title = f"{called} ({_short(made_by)})" if called else _short(made_by)
        yield (
            f"teacher.model: {shown_name(name)} is not the teacher of {store.name} ({found}), "
            f"which was made by {title}: set teacher.model to that one, or teacher.model=null to "
            f"take the cache as it is, {_WAY_OUT}"
        )


def _differs(config: Config, made_by: dict[str, Any], *, contents: bool) -> str | None:
    """Returns how the recorded teacher differs: "" for not at all, None if it cannot be known."""
    teacher = config.teacher
    try:
        files = find_model(
            teacher.model, key="teacher.model", revision=teacher.revision, fetch=False
        )
    except ConfigError:
        return None
    if files.adapter is None and config_hash(files.settings) != made_by.get("config"):
        return "another config.json"
    if not contents or not _has_weights(files):
        return "" if not files.on_hub else None
    identity = model_identity(files.folder, adapter_folder(files))
    same = all(identity[name] == made_by.get(name) for name in ("config", "weights"))
    return "" if same else "other weights"


def _has_weights(files: ModelFiles) -> bool:
    try:
        return bool(files.weights()) and files.incomplete_weights() is None
    except MegadistillError:
        return False


def _short(made_by: dict[str, Any]) -> str:
    weights = str(made_by.get("weights"))[:16]
    return f"{made_by.get('architecture', 'a model')}, weights {weights}"


def _updated(section: Any, update: dict[str, Any]) -> Any:
    """A copy that says which keys the user set, as the section does."""
    copy = section.model_copy(update=update)
    object.__setattr__(copy, "__pydantic_fields_set__", set(section.model_fields_set))
    return copy
