"""A corpus that the benchmarks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadistill.data.tokens import build_tokens
from tests.bench.small import config
from tests.models.made import teacher_and_text


@pytest.fixture(scope="package")
def corpus(tmp_path_factory) -> Path:
    """A teacher in `teacher`, and the token store of a text in `tokens`."""
    folder = teacher_and_text(tmp_path_factory.mktemp("bench"), documents=300)
    build_tokens(config(folder), progress=False)
    return folder
