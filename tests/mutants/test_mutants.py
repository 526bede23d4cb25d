"""Mutants: wrong expressions that the tests of their subpackage must notice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.kill import ROOT, copied, killed, places
from tests.mutants.planted import MUTANTS, Mutant

named = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("repository"))


@pytest.mark.long
@named
def test_a_mutant_is_killed(mutant: Mutant, repository: Path) -> None:
    outcome = killed(mutant, folder=repository)
    assert outcome["killed"], f"survived {mutant.tests}: {mutant.old} -> {mutant.new}"


@named
def test_a_mutant_has_one_place_and_tests_that_are_there(mutant: Mutant) -> None:
    found = [str(file.relative_to(ROOT)) for file in places(mutant)]
    assert len(found) == 1, found
    assert mutant.new != mutant.old
    assert [name for name in mutant.tests if not (ROOT / name).exists()] == []


def test_every_subpackage_has_mutants() -> None:
    package = ROOT / "megadistill"
    # Benchmarks measure, and are run by their own test.
    with_code = {f.name for f in package.iterdir() if (f / "__init__.py").exists()} - {"bench"}
    assert {mutant.area.partition("/")[0] for mutant in MUTANTS} == with_code
    assert len(MUTANTS) >= 36
    assert Counter(mutant.name for mutant in MUTANTS).most_common(1)[0][1] == 1
