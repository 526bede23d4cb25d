"""A corpus and the cache of one undisturbed rank, for the tests that build caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cache.building import make_corpus, settings
from tests.ranks import run_ranks


@pytest.fixture(scope="package")
def corpus(tmp_path_factory) -> Path:
    """A teacher with its tokenizer, a corpus, and its tokens."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="package")
def single(corpus, tmp_path_factory) -> Path:
    """The cache of one undisturbed rank."""
    cache = tmp_path_factory.mktemp("single") / "cache"
    run_ranks(1, "tests.cache.building:build", config=settings(corpus, cache))
    return cache
