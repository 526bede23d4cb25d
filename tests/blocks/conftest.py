"""Stores at URLs: a file system in memory, a store in it, a folder for local copies."""

from __future__ import annotations

import fsspec
import pytest

from megadistill.blocks.remote import object_store
from megadistill.blocks.remote.shard_cache import LocalCopies
from megadistill.blocks.remote.upload import copy_store
from tests.blocks.remote.remotes import SAMPLES
from tests.blocks.stores import fill


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(object_store, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def memory():
    """A file system in memory, emptied."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return fs


@pytest.fixture
def source(tmp_path):
    return fill(tmp_path / "source", SAMPLES)


@pytest.fixture
def url(memory, source):
    copy_store(source.path, "memory://bucket/store")
    return "memory://bucket/store"


@pytest.fixture
def local(tmp_path):
    return LocalCopies(tmp_path / "local")
