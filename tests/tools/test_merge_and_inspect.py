"""tools/merge_and_inspect.py by its contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.blocks.stores import tree
from tests.cache.caches import fill_cache
from tests.tools.test_inspect_cache import load


def merge(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    from megadistill.commands import run

    code = run(load("merge_and_inspect").main, [str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_parts_become_the_single_run_and_are_shown(tmp_path: Path, capsys) -> None:
    single = fill_cache(tmp_path / "single")
    a = fill_cache(tmp_path / "a", blocks=[0, 2]).path
    b = fill_cache(tmp_path / "b", blocks=[1]).path
    code, out, _ = merge(capsys, "--out", tmp_path / "merged", a, b)
    assert code == 0
    assert "complete" in out
    assert tree(tmp_path / "merged") == tree(single.path)
    code, out, _ = merge(capsys, "--out", tmp_path / "half", a, "--json")
    assert code == 1
    assert json.loads(out)["missing_blocks"] == [1]


def test_what_cannot_be_merged_is_two_in_one_line(tmp_path: Path, capsys) -> None:
    a = fill_cache(tmp_path / "a").path
    other = fill_cache(tmp_path / "other", tau=0.1).path
    code, _, error = merge(capsys, "--out", tmp_path / "merged", a, other)
    assert code == 2
    assert "recipe.tau is 0.06" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    code, _, error = merge(capsys, "--out", tmp_path / "mine", a)
    assert code == 2
    assert "notes.txt" in error
    assert merge(capsys, "--out", tmp_path / "merged", tmp_path / "nowhere")[0] == 2
    assert not (tmp_path / "merged").exists()
