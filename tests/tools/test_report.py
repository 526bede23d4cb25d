"""tools/report.py by its contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.inspect.test_training_report import make_run
from tests.programs import ROOT, program


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    from megadistill.cli.command_line import run

    code = run(program("tools/report.py").main, [str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_a_run_is_reported_into_its_own_folder(tmp_path: Path, capsys) -> None:
    run = Path(make_run(tmp_path / "run"))
    code, out, _ = report(capsys, run)
    assert code == 0
    assert out.startswith("# Training run\n\n| run ")
    written = (run / "report.md").read_text()
    assert "![curves](report.png)" in written
    assert written.replace("![curves](report.png)\n\n", "") == out
    assert (run / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_several_runs_are_compared_where_out_says(tmp_path: Path, capsys) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    code, _, error = report(capsys, *runs)
    assert code == 2
    assert error.startswith("error: --out: is not given, and 2 runs have no folder in common")
    code, out, _ = report(capsys, *runs, "--out", tmp_path / "new" / "comparison")
    assert code == 0
    assert out.startswith("# 2 training runs")
    names = {path.name for path in (tmp_path / "new" / "comparison").iterdir()}
    assert names == {"report.md", "report.png"}
    assert not (tmp_path / "one" / "report.md").exists()


def test_what_cannot_be_reported_is_a_line_and_nothing_is_written(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "file").touch()
    for arguments, said in (
        ((tmp_path,), "is no training run"),
        ((run, tmp_path / "nowhere", "--out", tmp_path / "o"), "nowhere: is no training run"),
        ((run, "--out", tmp_path / "file"), "cannot be written"),
    ):
        code, _, error = report(capsys, *arguments)
        assert code == 2
        assert said in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_reporting_starts_without_torch_or_streaming(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'streaming', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(ROOT / "tools" / "report.py")]
    subprocess.run([*command, make_run(tmp_path / "run")], check=True, capture_output=True)
