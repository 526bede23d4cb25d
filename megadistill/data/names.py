"""Names of models and data, for reading: never where they lie, on whose machine, or a key.

A hub id stays as it is; of a folder or a file the last name is kept, of a URL the last part of its
path. Names stand in a store's header beside the recipe, outside of every comparison.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from megadistill.config import Config, DataConfig
from megadistill.data.recipe_keys import corpus_key
from megadistill.models.model_files import may_be_hub_id
from megadistill.storage.disk import is_url

_SHOWN = 3  # files
# models--owner--name in the hub's cache, where a snapshot's folder is called by its commit.
_HUB_FOLDER = re.compile(r"(?:models|datasets)--(.+)")
_HUB_URL = re.compile(r"hf://(?:datasets/|models/)?(?!datasets/|models/)([^/@:]+/[^/@:?#]+)")


def shown_name(name: str) -> str:
    """A hub id, or the last name of a folder, a file or a URL."""
    on_hub = _HUB_URL.match(name)
    if on_hub:
        return on_hub[1]
    if is_url(name) or "://" in name:
        return unquote(urlsplit(name).path.rstrip("/").rpartition("/")[2]) or "a URL"
    path = Path(name).expanduser()
    for part in reversed(path.parts):
        found = _HUB_FOLDER.fullmatch(part)
        if found:
            return found[1].replace("--", "/", 1)
    if may_be_hub_id(name) and not path.exists():
        return name
    last = path.name
    return last if last not in ("", "..") else path.resolve().name or "a folder"


def data_names(data: DataConfig) -> dict[str, str]:
    """{the key that names the corpus: what it is called}; {} where none is named."""
    if data.source is not None:
        return {corpus_key(data): data.source}
    if data.files is not None:
        names = list(dict.fromkeys(shown_name(file) for file in data.files))
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return {corpus_key(data): ", ".join(names[:_SHOWN]) + more}
    if data.name is None:
        return {}
    parts = [shown_name(data.name), data.config, None if data.split == "train" else data.split]
    return {corpus_key(data): ", ".join(part for part in parts if part)}


def token_names(config: Config) -> dict[str, str]:
    """The names of tokenizer and corpus alone: a token store is the same for every teacher."""
    return {k: name for k, name in store_names(config).items() if k != "teacher.model"}


def store_names(config: Config) -> dict[str, str]:
    """The names of teacher, tokenizer and corpus, by key; what is not set is left out."""
    teacher, tokenizer = config.teacher.model, config.data.tokenizer or config.teacher.model
    models = {"teacher.model": teacher, "data.tokenizer": tokenizer}
    return {k: shown_name(name) for k, name in models.items() if name} | data_names(config.data)
