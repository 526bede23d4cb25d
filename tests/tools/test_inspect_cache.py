"""tools/inspect_cache.py by its contract: exit codes, JSON, pictures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.blocks.stores import create, fill, make_samples
from tests.cache.caches import fill_cache

TOOLS = Path(__file__).resolve().parents[2] / "tools"
KEYS = {
    "format_version", "complete", "num_blocks", "missing_blocks", "num_sequences", "num_positions",
    "method", "entries_per_position", "bytes_per_position", "content_hash", "teacher", "tokenizer",
    "vocab_size", "seq_len", "listed_mass", "entropy", "teacher_nll",
}  # fmt: skip


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    from megadistill.commands import run

    code = run(load("inspect_cache").main, [str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_a_complete_cache_is_zero_and_says_everything(tmp_path: Path, capsys) -> None:
    store = fill_cache(tmp_path / "cache")
    code, out, _ = inspect(capsys, store.path, "--json", "--verify")
    facts = json.loads(out)
    assert code == 0
    assert facts.keys() >= KEYS
    assert facts["complete"] is True
    assert facts["missing_blocks"] == facts["findings"] == []
    assert (facts["num_blocks"], facts["num_sequences"]) == (3, 10)
    assert (facts["method"], facts["vocab_size"], facts["seq_len"]) == ("varopt", 1000, 8)
    assert facts["content_hash"] == store.content_hash()
    size = sum(len(store[i]["targets"]) for i in range(10))
    assert facts["bytes_per_position"] == size / facts["num_positions"]
    assert facts["entropy"].keys() == {"mean", "p05", "p50", "p95"}
    code, out, _ = inspect(capsys, store.path)
    assert code == 0
    assert "cache, format 1, complete" in out
    assert "varopt (temperature 0.7, tau 0.06)" in out


def test_a_token_store_is_inspected_too(tmp_path: Path, capsys) -> None:
    fill(tmp_path / "store", make_samples(10))
    code, out, _ = inspect(capsys, tmp_path / "store", "--verify")
    assert code == 0
    assert "tokens, format 1, complete" in out
    assert "documents" in out
    code, out, _ = inspect(capsys, tmp_path / "store", "--json")
    assert json.loads(out)["num_positions"] == 80


def test_missing_blocks_are_one_and_listed(tmp_path: Path, capsys) -> None:
    fill_cache(tmp_path / "cache", blocks=[1])
    code, out, _ = inspect(capsys, tmp_path / "cache")
    assert code == 1
    assert "missing blocks" in out
    assert json.loads(inspect(capsys, tmp_path / "cache", "--json")[1])["missing_blocks"] == [0, 2]


def test_damage_is_one_and_named(tmp_path: Path, capsys) -> None:
    store = fill_cache(tmp_path / "cache")
    shard = store.layout.shard(1)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    code, out, _ = inspect(capsys, store.path, "--verify")
    assert code == 1
    assert "DAMAGED" in out
    assert "shard.000001.mds" in out
    marker = store.layout.marker(2)
    marker.write_bytes(marker.read_bytes()[:-5])
    assert inspect(capsys, store.path)[0] == 1
    assert "000002.json" in inspect(capsys, store.path)[1]


def test_a_store_that_is_still_being_written_is_one_and_says_so(tmp_path: Path, capsys) -> None:
    create(tmp_path / "store")
    code, out, _ = inspect(capsys, tmp_path / "store")
    assert code == 1
    assert "has not ended" in out


def test_what_cannot_be_read_is_two_in_one_line(tmp_path: Path, capsys) -> None:
    fill_cache(tmp_path / "cache")
    (tmp_path / "cache/cache.json").write_bytes(b"{}")
    for path in (tmp_path / "cache", tmp_path / "nowhere", tmp_path):
        code, out, error = inspect(capsys, path)
        assert (code, out) == (2, "")
        assert len(error.splitlines()) == 1
        assert str(path) in error
    assert inspect(capsys, "--config", tmp_path / "none.yaml")[0] == 2


def test_the_configurations_cache_is_the_default(tmp_path: Path, capsys) -> None:
    store = fill_cache(tmp_path / "cache")
    code, out, _ = inspect(capsys, "--config", "demo.yaml", f"cache.dir={store.path}")
    assert code == 0
    assert str(store.path) in out


def test_pictures_are_written_on_request(tmp_path: Path, capsys) -> None:
    fill_cache(tmp_path / "cache")
    assert inspect(capsys, tmp_path / "cache", "--plot", tmp_path / "pictures")[0] == 0
    names = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert names == [
        "bytes_per_position.png", "entries_per_position.png", "entropy.png", "listed_mass.png"
    ]  # fmt: skip


def test_inspecting_starts_without_torch_or_streaming(tmp_path: Path) -> None:
    fill_cache(tmp_path / "cache")
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'streaming', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, str(TOOLS / "inspect_cache.py")]
    subprocess.run([*command, str(tmp_path / "cache"), "--verify"], check=True)
