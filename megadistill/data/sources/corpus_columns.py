"""Which columns of a corpus are read: those that `data.*_field` name, or the ones found there.

Without a `data.*_field` key, a corpus has exactly one of these: `messages` (or `conversations`), a
chat; `prompt` with `completion`; `text`. The columns found belong to the recipe as if they had been
configured.
"""

from __future__ import annotations

from megadistill.config import DataConfig
from megadistill.errors import DataError

KEYS = ("messages_field", "prompt_field", "completion_field", "text_field", "tools_field")
_KNOWN = (
    {"messages_field": "messages"},
    {"messages_field": "conversations"},
    {"prompt_field": "prompt", "completion_field": "completion"},
    {"text_field": "text"},
)


def configured(config: DataConfig) -> dict[str, str]:
    """Column by key, for the keys that are set."""
    return {key: name for key in KEYS if (name := getattr(config, key)) is not None}


def detect(config: DataConfig, found: list[str], where: str) -> DataConfig:
    """`config` with the keys of the columns found in a corpus. DataError: none or several fit."""
    fitting = [known for known in _KNOWN if set(known.values()) <= set(found)]
    if len(fitting) == 1:
        return config.model_copy(update=fitting[0])
    listed = ", ".join(found) if found else "none"
    if not fitting:
        raise DataError(
            f"{where}: found no column messages, conversations, prompt with completion, or text; "
            f"its columns are {listed}: set data.text_field, data.messages_field, or "
            "data.prompt_field with data.completion_field to one of them"
        )
    several = " and ".join(" with ".join(known.values()) for known in fitting)
    ways = ", or ".join(
        " ".join(f"data.{key}={name}" for key, name in known.items()) for known in fitting
    )
    raise DataError(f"{where}: has the columns {several}, expected one of them: set {ways}")


def check(config: DataConfig, found: list[str], where: str) -> None:
    """DataError where a file lacks a column that is read. Files without tools are ordinary."""
    for key, name in configured(config).items():
        if key == "tools_field":
            continue
        if name not in found:
            raise DataError(
                f"data.{key}: {where} has no column {name!r}; its columns are "
                f"{', '.join(found) or 'none'}: set data.{key} to one of them"
            )
