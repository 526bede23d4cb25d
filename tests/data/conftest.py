"""Tokenizers and configurations for the tests of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megadistill.config import Config
from tests.models.made import tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def config(tokenizer: str, tmp_path: Any) -> Callable[..., Config]:
    """A configuration with the keys that are given in `data`, of small sequences and blocks."""

    def make(**data: Any) -> Config:
        settings = {"dir": str(tmp_path / "tokens"), "seq_len": 32, "block_size": 16, "workers": 1}
        return Config(data=settings | data, teacher={"model": tokenizer})

    return make
