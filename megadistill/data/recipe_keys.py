"""Configuration keys for the fields of a token store's and a cache's recipe.

Stores record fields of their own (`recipe.tokens.source.content`); a user set `data.files`. The
last rule is general, so that a field which is added later has a key as well.
"""

from __future__ import annotations

from megadistill.blocks.recipe import Keys
from megadistill.config import Config, DataConfig, TargetsConfig, TeacherConfig

# Of a recipe, by the beginning of the dotted field, longest first.
_FIELDS = {
    "source.shuffle.seed": "data.seed",
    "source.shuffle": "data.shuffle",
    "source.revision": "data.revision",
    "source.config": "data.config",
    "source.distribution": "data.source",
    "source.options": "data.options",
    "source.split": "data.split",
    "source.python": "data.source",
    "tokenizer.assistant_mask": "data.assistant_mask",
    "tokenizer.chat_date": "data.chat_date",
    "tokenizer.chat_template": "data.chat_template",
    "tokenizer.chat_variables": "data.chat_template_kwargs",
    "tokenizer.tool_use_template": "data.chat_template",
    "tokenizer": "data.tokenizer",
    "vocab_size": "data.tokenizer",
    "teacher": "teacher.model",
}
CORPUS_KEYS = ("data.source", "data.files", "data.name")
_COLUMNS = {
    "columns.loss_mask": "data.messages_field",
    "columns.padding": "data.packing",
    "columns.tokens": "data.seq_len",
}


def keys_of(config: Config | None, *, kind: str) -> Keys:
    """How to name the fields of a store of `kind`. config: None where there is none, as in a tool.

    The corpus goes by the key that names it, and its columns by the field that is set.
    """
    data = None if config is None else config.data
    folder = "cache.dir" if kind == "cache" else "data.dir"
    way_out = f"restore the setting, or set {folder} to another folder"
    return Keys(of=lambda field: _key(field, data), way_out=way_out)


def _key(field: str, data: DataConfig | None) -> str:
    if not field.startswith("recipe."):
        if field in _COLUMNS:
            return _column_key(data) if field == "columns.loss_mask" else _COLUMNS[field]
        return f"data.{field}" if field == "block_size" else field
    name = field.removeprefix("recipe.").removeprefix("tokens.")
    if name in ("source.source", "source.content"):
        return corpus_key(data)
    if name.startswith("source.fields"):
        return _column_key(data)
    for start, key in _FIELDS.items():
        if name == start or name.startswith(f"{start}."):
            return key
    for section, model in (
        ("data", DataConfig),
        ("targets", TargetsConfig),
        ("teacher", TeacherConfig),
    ):
        if name in model.model_fields and (section, name) != ("data", "seed"):
            return f"{section}.{name}"
    return name if "recipe.tokens." not in field else f"data.{name}"


def corpus_key(data: DataConfig | None) -> str:
    """The key that names the corpus."""
    given = (name for name in ("source", "files", "name") if data and getattr(data, name))
    return f"data.{next(given, 'files')}"


def _column_key(data: DataConfig | None) -> str:
    columns = ("messages_field", "completion_field")
    given = (name for name in columns if data and getattr(data, name))
    return f"data.{next(given, 'text_field')}"
