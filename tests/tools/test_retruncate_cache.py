"""tools/retruncate_cache.py by its contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.blocks.stores import tree
from tests.cache.caches import fill_cache
from tests.programs import program


def retruncate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    from megadistill.cli.command_line import run

    code = run(program("tools/retruncate_cache.py").main, [str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_a_smaller_cache_is_made_and_shown(tmp_path: Path, capsys) -> None:
    source = fill_cache(tmp_path / "source")
    code, out, _ = retruncate(capsys, source.path, "--out", tmp_path / "out", "--tau", 0.25)
    assert code == 0
    assert "cache, format 1, complete" in out
    assert "varopt (temperature 0.7, tau 0.25)" in out
    before = tree(tmp_path / "out")
    code, out, _ = retruncate(
        capsys, source.path, "--out", tmp_path / "out", "--tau", 0.25, "--json"
    )
    facts = json.loads(out)
    assert code == 0
    assert facts["complete"] is True
    assert facts["num_sequences"] == 10
    assert tree(tmp_path / "out") == before


def test_a_topk_cache_goes_to_a_smaller_k(tmp_path: Path, capsys) -> None:
    source = fill_cache(tmp_path / "source", method="topk", k=6)
    code, out, _ = retruncate(capsys, source.path, "--out", tmp_path / "out", "--k", 2, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["parameters"]["k"] == 2
    assert facts["entries_per_position"] <= 3


def test_what_cannot_be_made_is_two_in_one_line(tmp_path: Path, capsys) -> None:
    source = fill_cache(tmp_path / "source").path
    for arguments, said in (
        ((source, "--tau", 0.01), "tau: is 0.06"),
        ((source, "--k", 4), "retruncated by tau"),
        ((source,), "found none given"),
        ((tmp_path / "nowhere", "--tau", 0.3), "nowhere"),
    ):
        code, out, error = retruncate(capsys, *arguments, "--out", tmp_path / "out")
        assert (code, out) == (2, "")
        assert said in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
