"""A folder with a teacher, a student and a text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.models.made import tiny_model


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("teacher", "student"):
        tiny_model(folder / name)
    return folder


@pytest.fixture
def start_folder(models, tmp_path, monkeypatch) -> Path:
    for name in ("teacher", "student"):
        shutil.copytree(models / name, tmp_path / name)
    (tmp_path / "a.txt").write_text("Some text. " * 100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path
