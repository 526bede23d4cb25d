"""Every key of the configuration is named in a test."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megadistill.config.schema import Config

TESTS = Path(__file__).parent
KEYS_WITHOUT_A_TEST: set[str] = set()


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models_in(inner)


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Full names of the keys that hold values, those of sections in lists included."""
    for name, field in model.model_fields.items():
        sections = list(models_in(field.annotation))
        for section in sections:
            yield from keys_of(section, f"{prefix}{name}.")
        if not sections:
            yield f"{prefix}{name}"


def names(text: str, key: str) -> bool:
    """Whether a test's text has the key: dotted, or its section and the key beside a value."""
    section, _, leaf = key.rpartition(".")
    top = section.partition(".")[0]
    if re.search(rf"\b{re.escape(key)}\b", text):
        return True
    given = re.search(rf'"{leaf}"\s*:|\b{leaf}=', text)
    return bool(given and re.search(rf'"{top}"|\b{top}=|\b{top.capitalize()}Config', text))


def test_every_key_is_named_in_a_test() -> None:
    texts = [
        file.read_text("utf-8") for file in TESTS.rglob("*.py") if file != Path(__file__).resolve()
    ]
    keys = {key for key in keys_of(Config) if "." in key}
    assert len(keys) > 120
    unnamed = {key for key in keys if not any(names(text, key) for text in texts)}
    assert unnamed == KEYS_WITHOUT_A_TEST


def test_a_key_that_no_test_has_would_be_found() -> None:
    text = '{"train": {"steps": 4}} cache.local_limit=1'
    assert names(text, "train.steps")
    assert names(text, "cache.local_limit")
    assert not names(text, "train.epochs")
    assert not names(text, "loss.steps")
