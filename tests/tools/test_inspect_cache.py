"""tools/inspect_cache.py by its contract: exit codes, JSON, pictures."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.cache.reader import open_cache
from megadistill.cache.writer import CacheWriter
from tests.blocks.stores import create, fill, make_samples
from tests.cache.caches import block_of, create_cache, fill_cache
from tests.models.made import tiny_tokenizer
from tests.programs import program

TOOLS = Path(__file__).resolve().parents[2] / "tools"
KEYS = {
    "format_version",
    "complete",
    "num_blocks",
    "missing_blocks",
    "num_sequences",
    "num_positions",
    "method",
    "entries_per_position",
    "bytes_per_position",
    "content_hash",
    "teacher",
    "tokenizer",
    "vocab_size",
    "seq_len",
    "listed_mass",
    "entropy",
    "teacher_nll",
}


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    from megadistill.cli.command_line import run

    code = run(program("tools/inspect_cache.py").main, [str(a) for a in arguments])
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


def test_mistakes_are_one_line_each(tmp_path: Path, capsys) -> None:
    cache = fill_cache(tmp_path / "cache").path
    part = fill_cache(tmp_path / "part", blocks=[1]).path
    tokens = fill(tmp_path / "tokens", make_samples(10)).path
    nowhere, model = tmp_path / "nowhere", tmp_path
    for arguments, said in (
        ((cache, "--diff", nowhere), "no such folder"),
        ((cache, "--diff", tmp_path), "not a cache or a token store"),
        ((cache, "--diff", tokens), "expected two of one kind to compare"),
        ((nowhere, "--show", 1), "no such folder"),
        ((tokens, "--show", 1), "is a store of kind tokens, expected a cache"),
        ((cache, "--show", 10), "has no sequence 10, expected a number from 0 to 9"),
        ((cache, "--show", -1), "has no sequence -1"),
        ((part, "--show", 9), "block 2 is missing"),
        ((cache, "--show", 1, "--positions", "5:5"), "--positions 5:5: expected A:B"),
        ((cache, "--show", 1, "--positions", "0:9"), "from 0:8 of this sequence"),
        ((cache, "--show", 1, "--positions", "3"), "expected A:B"),
        ((cache, "--show", 1, "--positions", "a:b"), "expected A:B"),
        ((cache, "--show", 1, "--tokenizer", model), "no tokenizer can be loaded"),
        ((tokens, "--plot", tmp_path / "p"), "has no targets to plot"),
    ):
        code, _, error = inspect(capsys, *arguments)
        assert code == 2, arguments
        assert len(error.splitlines()) == 1
        assert said in error, error


@pytest.mark.parametrize(
    "arguments",
    [
        ["--show", "one"],
        ["--diff", "a", "--show", "1"],
        ["--positions", "0:1"],
        ["--tokenizer", "a"],
    ],
)
def test_arguments_that_do_not_go_together_are_refused(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        inspect(capsys, "cache", *arguments)
    assert left.value.code == 2


def test_equal_content_is_zero_whatever_made_it(tmp_path: Path, capsys) -> None:
    cache = fill_cache(tmp_path / "cache").path
    other = fill_cache(tmp_path / "other", torch="2.15.0").path
    code, out, _ = inspect(capsys, cache, "--diff", cache)
    assert (code, "EQUAL in content" in out) == (0, True)
    code, out, _ = inspect(capsys, cache, "--diff", other)
    assert code == 0
    assert "no part of the content" in out
    assert "made_with.torch: A 2.13.0, B 2.15.0 (block 0, 1, 2)" in out
    (other / "index.json").unlink()
    code, out, _ = inspect(capsys, cache, "--diff", other, "--json")
    facts = json.loads(out)
    assert (code, facts["equal"], facts["first"]) == (0, True, None)
    assert "index.json" in facts["derived"]


def test_a_difference_is_one_and_told_down_to_the_position(tmp_path: Path, capsys) -> None:
    cache = fill_cache(tmp_path / "cache").path
    other = create_cache(tmp_path / "other", tau=0.1)
    other.plan(9)
    with CacheWriter(other) as writer:
        for block in (0, 1):
            samples, targets = block_of(block, total=10)
            if block == 1:
                targets[2] = dataclasses.replace(targets[2], nll=targets[2].nll + 1)
            writer.submit(block, samples, targets)
    other.finish()
    code, out, _ = inspect(capsys, cache, "--diff", other.path, "--json")
    facts = json.loads(out)
    assert (code, facts["equal"]) == (1, False)
    assert facts["recipe"] == [{"field": "recipe.tau", "left": 0.06, "right": 0.1}]
    assert facts["plan"] == {"left": 10, "right": 9}
    assert (facts["only_left"], facts["only_right"]) == ([2], [])
    assert facts["different_blocks"] == [1]
    assert [(e["field"], e["blocks"]) for e in facts["told"]] == [("made_with.torch", [0])]
    first = facts["first"]
    assert (first["block"], first["sequence"], first["position"]) == (1, 6, 0)
    assert {k for k in first["left"] if first["left"][k] != first["right"][k]} == {"nll"}
    lines = inspect(capsys, cache, "--diff", other.path)[1].splitlines()
    places = [
        next(n for n, line in enumerate(lines) if line.strip().startswith(start))
        for start in ("DIFFERENT", "recipe.tau", "planned", "blocks only in A", "first difference")
    ]
    assert places == sorted(places)
    assert "block 1, sequence 6, position 0" in lines[places[-1]]
    assert [line.split()[0] for line in lines if line.endswith("differs")] == ["nll"]


def test_token_stores_are_compared_too(tmp_path: Path, capsys) -> None:
    samples = make_samples(10)
    fill(tmp_path / "a", samples)
    samples[5]["tokens"][3] += 1
    fill(tmp_path / "b", samples)
    code, out, _ = inspect(capsys, tmp_path / "a", "--diff", tmp_path / "b")
    assert code == 1
    assert "block 1, sequence 5, position 3" in out


def test_other_block_sizes_are_not_compared_block_by_block(tmp_path: Path, capsys) -> None:
    fill(tmp_path / "a", make_samples(4))
    create(tmp_path / "b", block_size=8)
    code, out, _ = inspect(capsys, tmp_path / "a", "--diff", tmp_path / "b")
    assert code == 1
    assert "block_size" in out
    assert "of other sizes, not compared" in out


def test_a_sequence_is_shown_by_ids_without_a_tokenizer(tmp_path: Path, capsys) -> None:
    cache = open_cache(fill_cache(tmp_path / "cache").path)
    code, out, _ = inspect(capsys, cache.path, "--show", 5, "--json")
    facts = json.loads(out)
    assert code == 0
    assert [p["token"] for p in facts["positions"]] == cache[5]["tokens"].tolist()
    row = facts["positions"][3]
    assert row["ids"] == cache[5]["targets"].rows(3, 4).ids.tolist()
    assert row["next_token"] in (cache[5]["tokens"][4], None)
    code, out, _ = inspect(capsys, cache.path, "--show", 5, "--positions", ":3")
    rows = [line for line in out.splitlines() if line[:5].strip().isdigit()]
    assert [line.split()[:2] for line in rows] == [
        [str(n), str(token)] for n, token in enumerate(cache[5]["tokens"][:3])
    ]
    assert "-- document" in out


def test_a_sequence_is_shown_as_text_that_fits_a_terminal(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = fill_cache(tmp_path / "cache").path
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setenv("COLUMNS", "90")
    code, out, error = inspect(capsys, cache, "--show", 2, "--tokenizer", tokenizer)
    assert code == 0
    assert "made with the tokenizer" in error  # another one than the recipe's
    assert "<id " in out  # ids beyond this tokenizer's 512
    assert max(map(len, out.splitlines()[1:])) <= 90
    config = ("--config", "demo.yaml", f"cache.dir={cache}", f"data.tokenizer={tokenizer}")
    assert inspect(capsys, *config, "--show", 2)[1] == out


def test_the_configurations_cache_is_the_default(tmp_path: Path, capsys) -> None:
    store = fill_cache(tmp_path / "cache")
    code, out, _ = inspect(capsys, "--config", "demo.yaml", f"cache.dir={store.path}")
    assert code == 0
    assert str(store.path) in out


def test_pictures_are_written_on_request(tmp_path: Path, capsys) -> None:
    fill_cache(tmp_path / "cache")
    assert inspect(capsys, tmp_path / "cache", "--plot", tmp_path / "pictures")[0] == 0
    (tmp_path / "file").touch()
    assert inspect(capsys, tmp_path / "cache", "--plot", tmp_path / "file")[0] == 2
    names = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert names == [
        "bytes_per_position.png",
        "entries_per_position.png",
        "entropy.png",
        "listed_mass.png",
    ]


def test_inspecting_starts_without_torch_or_streaming(tmp_path: Path) -> None:
    fill_cache(tmp_path / "cache")
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'streaming', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, str(TOOLS / "inspect_cache.py")]
    cache = str(tmp_path / "cache")
    for arguments in (["--verify"], ["--diff", cache], ["--show", "1"]):
        subprocess.run([*command, cache, *arguments], check=True)
