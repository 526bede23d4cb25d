"""tools/copy_cache.py, and tools/inspect_cache.py of what it copied."""

from __future__ import annotations

import json
import re

import pytest

from megadistill.cli.command_line import run
from tests.cache.caches import fill_cache
from tests.programs import program
from tests.tools.test_inspect_cache import inspect


def copy(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(program("tools/copy_cache.py").main, [str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_a_cache_is_copied_there_and_back_and_inspected_on_the_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    cache = fill_cache(tmp_path / "cache")
    url = f"file://{tmp_path}/far"
    assert copy(capsys, cache.path, url, "--verify")[:2] == (
        0,
        f"{url}: 3 blocks sent, 0 were there\n",
    )
    assert copy(capsys, url, tmp_path / "back")[0] == 0
    facts = []
    for place in (cache.path, url, tmp_path / "back"):
        code, out, _ = inspect(capsys, place, "--verify", "--json")
        assert code == 0
        facts.append(json.loads(out))
        assert facts[-1].pop("path") == str(place)
    assert facts[0] == facts[1] == facts[2]


def test_a_cache_at_a_url_with_a_damaged_shard(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    url = f"file://{tmp_path}/far"
    copy(capsys, fill_cache(tmp_path / "cache").path, url)
    shard = tmp_path / "far" / "shard.000001.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert inspect(capsys, url)[0] == 0  # sizes only
    code, out, _ = inspect(capsys, url, "--verify")
    assert code == 1
    assert re.search(r"far/shard.000001.mds: expected .*xxh3", out)


def test_what_cannot_be_copied_is_told_in_a_line(tmp_path, capsys):
    code, _, said = copy(capsys, tmp_path / "none", tmp_path / "there")
    assert code == 2
    assert said == f"error: {tmp_path}/none: no such folder, expected a cache or a token store\n"
    cache = fill_cache(tmp_path / "cache")
    code, _, said = copy(capsys, cache.path, "nosuch://x")
    assert code == 2
    assert said.startswith("error: nosuch://x: nosuch:// is not known")
    other = fill_cache(tmp_path / "other", tau=0.5)
    code, _, said = copy(capsys, cache.path, other.path)
    assert code == 2
    assert "tau" in said


def test_of_a_list_of_caches_one_is_to_be_named(tmp_path, capsys):
    code, _, said = inspect(capsys, "--config", "demo.yaml", "cache.dir=[a, b]")
    assert code == 2
    assert said.startswith("error: cache.dir: is a list of 2 caches: name the one to inspect")
