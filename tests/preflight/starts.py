"""Refusals of a start and of its dry run: the same lines, the same exit code, nothing written."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from megadistill.cli.command_line import run
from megadistill.config import Config, load_config
from megadistill.preflight import check_generate, check_train
from tests.programs import program

PROGRAMS: dict[Callable, str] = {
    check_generate: "launch/generate.py",
    check_train: "launch/train.py",
}
YAML = """
data: {files: [a.txt], dir: tokens, seq_len: 64}
teacher: {model: ./teacher, dtype: float32}
cache: {dir: cache, min_free: 0}
student: {model: ./student}
train: {steps: 10, out_dir: run}
"""


def config(*overrides: str) -> Config:
    Path("c.yaml").write_text(YAML)
    return load_config("c.yaml", list(overrides))


def listing(folder: str | Path = ".") -> dict[str, tuple[int, int]]:
    """Size and time of change of every file and folder below one."""
    found = {str(p): p.lstat() for p in Path(folder).rglob("*")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def start(file: str, *arguments: str, world: int = 1) -> tuple[int, list[str], str]:
    """(exit code, lines of errors, standard output) of a program as rank 0 of `world` ranks."""
    said, out = io.StringIO(), io.StringIO()
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    with (
        mock.patch.dict(os.environ, ranks),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(out),
    ):
        code = run(program(file).main, list(arguments))
    marked = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    return code, [line.removeprefix("error: ") for line in marked], out.getvalue()


def refused_lines(check: Callable, *overrides: str, world: int = 1) -> list[str]:
    """Lines of the start, equal to its dry run's. Nothing is written, and no plan printed."""
    config()  # writes c.yaml
    before, arguments = listing(), ["--config", "c.yaml", *overrides]
    answers = [
        start(PROGRAMS[check], *arguments, *how, world=world) for how in ((), ("--dry_run",))
    ]
    assert answers[0] == answers[1]
    assert listing() == before
    code, lines, out = answers[0]
    assert (code, out) == (2, "")
    return lines


def refused(check: Callable, *overrides: str, world: int = 1) -> str:
    """The one line that start and dry run say."""
    (line,) = refused_lines(check, *overrides, world=world)
    return line


def settings(model: str, **changed) -> None:
    path = Path(model) / "config.json"
    kept = {k: v for k, v in (json.loads(path.read_text()) | changed).items() if v is not None}
    path.write_text(json.dumps(kept))


def a_cache() -> None:
    Path("cache").mkdir()
    Path("cache/cache.json").write_text("{}")
