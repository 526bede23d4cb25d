"""tools/plan.py: what a few blocks say of runs of every size, and that nothing else is touched."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megadistill.blocks import open_store
from megadistill.cache.disk_guard import block_bytes
from megadistill.cli.command_line import run
from megadistill.config import load_config
from megadistill.preflight.plan import make_plan
from megadistill.preflight.plan.plan_report import Report
from megadistill.preflight.plan.sizes import SIZES, Rates, row
from tests.models.made import teacher_and_text
from tests.programs import program
from tests.ranks import run_ranks
from tests.tools.test_inspect_cache import TOOLS

YAML = """
data: {files: [text.jsonl], dir: tokens, seq_len: 32, block_size: 8, workers: 1}
teacher: {model: ./teacher, dtype: float32, micro_batch: 3}
targets: {tau: 0.1}
cache: {dir: cache, min_free: 0}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A teacher with its tokenizer, a text of 240 documents, and the cache of them all."""
    folder = teacher_and_text(tmp_path_factory.mktemp("plan"), documents=240)
    (folder / "c.yaml").write_text(YAML)
    return folder


@pytest.fixture
def place(corpus, monkeypatch) -> Path:
    monkeypatch.chdir(corpus)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return corpus


def files() -> set[str]:
    return {str(p) for p in Path().rglob("*")}


def measured(mesh, place: Path, temporary: Path, overrides: list[str], blocks: int):
    """What one rank measured; nothing is left of it in the folder of temporary files."""
    import os

    from megadistill.preflight.plan.measure import measure

    os.chdir(place)
    tempfile.tempdir = str(temporary)
    try:
        found = measure(load_config("c.yaml", overrides), mesh, blocks=blocks)
    finally:
        tempfile.tempdir = None
    mesh.barrier()
    assert os.listdir(temporary) == []
    return found


@pytest.mark.parametrize(
    ("ranks", "overrides", "copies"),
    [
        (1, [], 1),
        (2, [], 2),
        (2, ["teacher.tp=2"], 1),
        (2, ["teacher.engine=zero3"], 2),
        (2, ["data.max_samples=12"], 2),  # fewer blocks than are scored: they are scored again
    ],
)
def test_every_copy_scores_the_blocks_and_all_ranks_know_the_sum(
    place, tmp_path, ranks, overrides, copies
):
    before = files()
    tp = 2 if "teacher.tp=2" in overrides else 1
    found = run_ranks(
        ranks,
        "tests.tools.test_plan:measured",
        tp=tp,
        place=place,
        temporary=tmp_path,
        overrides=overrides,
        blocks=3,
    )
    for m in found:
        assert dataclasses.replace(m, load_s=0) == dataclasses.replace(found[0], load_s=0)
        assert (m.ranks, m.blocks) == (ranks, 3 * copies)
        assert m.tokens_per_s > 100
        assert 1 < m.entries_per_position < 12
        assert 4 < m.token_store_bytes_a_token < m.cache_bytes_a_token
    assert files() == before


def test_bytes_are_those_of_the_cache_that_generating_writes(place, tmp_path):
    settings = [f"data.dir={tmp_path}/tokens", f"cache.dir={tmp_path}/cache", "targets.tau=0.05"]
    run_ranks(1, "tests.tools.test_plan:generate", place=place, overrides=settings)
    cache = open_store(tmp_path / "cache")
    of_blocks = sum(block_bytes(cache, b) for b in cache.committed())
    empty = tmp_path / "temporary"
    empty.mkdir()
    found = run_ranks(
        1,
        "tests.tools.test_plan:measured",
        place=place,
        temporary=empty,
        overrides=settings,
        blocks=3,
    )[0]
    assert found.cache_bytes_a_token == pytest.approx(of_blocks / (len(cache) * 32), rel=0.1)


def generate(mesh, place: Path, overrides: list[str]) -> None:
    import os

    from megadistill.cache.build import build_cache

    os.chdir(place)
    build_cache(load_config("c.yaml", overrides), mesh, validate=False)


def test_the_program_measures_and_prints_one_json_object(place):
    before = files()
    done = subprocess.run(
        [
            sys.executable,
            str(TOOLS / "plan.py"),
            "--config",
            "c.yaml",
            "--blocks",
            "1",
            "--json",
            "--price",
            "3",
            "--currency",
            "EUR",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["measured"]["blocks"] == 1
    assert [r["tokens"] for r in facts["sizes"]] == [10**n for n in range(6, 12)]
    hours = [r["hours"] for r in facts["sizes"]]
    assert hours[0] == pytest.approx(1e6 / facts["measured"]["tokens_per_s"] / 3600)
    assert hours[5] == pytest.approx(1e5 * hours[0])
    assert facts["sizes"][0]["cost"] == pytest.approx(3 * hours[0])
    assert facts["this_run"]["sequences"] > 100
    assert files() == before


def plan(capsys, *arguments: str) -> tuple[int, str, str]:
    code = run(program("tools/plan.py").main, ["--config", "c.yaml", *arguments])
    return code, *capsys.readouterr()


def test_without_a_run_bytes_are_assumed_and_hours_unknown(place, capsys):
    before = files()
    code, out, _ = plan(capsys, "--no_run")
    assert code == 0
    assert out.startswith("assumed, nothing was run: ")
    assert "\n  tokens " in out
    assert out.count("holds it") + out.count("too small") == 7
    assert "this configuration: " in out
    facts = json.loads(plan(capsys, "--no_run", "--json")[1])
    assert facts["measured"] is None
    assert {r["hours"] for r in facts["sizes"]} == {None}
    assert files() == before


@pytest.mark.parametrize("method", ["exact", "projected", "varopt"])
def test_of_a_teacher_beside_the_student_there_is_no_cache_to_plan(place, capsys, method):
    online = (
        "teacher.mode=online",
        f"targets.method={method}",
        "student.model=teacher",
        "train.steps=1",
    )
    for how in ((), ("--no_run",), ("--dry_run",)):
        code, out, error = plan(capsys, *how, *online)
        assert (code, out) == (2, "")
        assert error.startswith("error: teacher.mode: online keeps no cache whose size could be")


def test_what_is_wrong_is_one_line_and_code_2(place, capsys):
    code, _, said = plan(capsys, "teacher.model=./none")
    assert code == 2
    assert said.startswith("error: teacher.model: ./none does not exist")
    for wrong in (["--blocks", "0"], ["--price", "-1"], ["--price", "nan"]):
        with pytest.raises(SystemExit) as left:
            plan(capsys, *wrong)
        assert left.value.code == 2
        assert "expected a" in capsys.readouterr().err


def a_row(tokens: int, *overrides: str, price: float | None = None):
    config = load_config("c.yaml", list(overrides))
    return row(config, Rates(4.5, 20, 1000), tokens, ranks=8, price=price)


def test_a_row_is_worked_out_from_the_rates(place):
    r = a_row(36_000_000, price=2)
    assert (r.sequences, r.blocks) == (1_125_000, 140_625)
    assert (r.token_store_bytes, r.cache_bytes) == (162_000_000, 720_000_000)
    assert (r.hours, r.rank_hours, r.cost) == (10, 80, 160)
    assert r.block_size_note == ""
    assert a_row(36_000_000).cost is None


def test_the_block_size_that_fits_is_named(place):
    r = a_row(10**9)
    assert r.blocks > 10**6
    assert r.block_size_note == f"needs data.block_size >= {math.ceil(10**9 / 32 / 10**6)}"
    assert a_row(10**9, f"data.block_size={r.block_size_at_least}").blocks <= 10**6
    largest = r.block_size_at_most
    load_config("c.yaml", [f"data.block_size={largest}"])
    with pytest.raises(Exception, match="4 GiB"):
        load_config("c.yaml", [f"data.block_size={largest + 1}"])
    huge = a_row(10**16)
    assert huge.block_size_note.endswith(
        "4 GiB a shard hold X: split it".replace("X", str(largest))
    )


def test_a_disk_that_is_too_small_is_said_of_the_sizes_it_does_not_hold(place):
    config = load_config("c.yaml", ["cache.min_free=0"])
    report = Report(
        config=config,
        plan=make_plan(config, world=1, training=False),
        ranks=1,
        rates=Rates(4, 10**6, 1),
    )
    assert len(report.rows) == len(SIZES)
    assert not report.rows[-1].fits
    assert report.own is not None
    assert report.own.fits
    assert "too small" in report.as_text()
    config = load_config("c.yaml", ["cache.min_free=1e6"])
    assert not dataclasses.replace(report, config=config).own.fits
