"""Fuzzed caches: 500 in the suite, 50,000 in the long run, which resumes where it was stopped."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadistill.cache.ranking import IdRanking
from tests.cache.caches import VOCAB_SIZE, fill_cache

ROOT = Path(__file__).resolve().parents[2]
CASES, PART = 50_000, 1_000


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cache of every method; half of them with a ranking of their ids."""
    folder = tmp_path_factory.mktemp("caches")
    ranking = IdRanking(np.random.default_rng(0).permutation(VOCAB_SIZE)).to_bytes()
    for method in ("varopt", "multinomial", "topk", "topp"):
        ids_bin = ranking if method in ("varopt", "topk") else None
        fill_cache(folder / method, method=method, ids_bin=ids_bin)
    return folder


def fuzz(caches: Path, first: int, last: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cache.fuzz", str(caches), str(first), str(last)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for number, reason in result["wrong"]:
        sys.stdout.write(f"case {number}: {reason}\n")
    assert result["wrong"] == []
    assert result["cases"] == last - first
    return result


def test_500_fuzzed_caches_give_our_errors_alone_and_no_wrong_sample(caches: Path) -> None:
    result = fuzz(caches, CASES, CASES + 500)  # others than those of the long run
    assert result["refused"] > 450  # some damage is none: a zero zeroed, a marker that is gone


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, CASES, PART))
def test_50000_fuzzed_caches(caches: Path, first: int, pytestconfig: pytest.Config) -> None:
    assert pytestconfig.cache is not None
    key, code = f"megadistill/fuzz-{first}", code_hash()
    if pytestconfig.cache.get(key, None) == code:
        return  # done before, by the same code
    fuzz(caches, first, first + PART)
    pytestconfig.cache.set(key, code)


def code_hash() -> str:
    found = hashlib.md5(usedforsecurity=False)
    folders = ("megadistill/blocks", "megadistill/cache", "tests/cache")
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
