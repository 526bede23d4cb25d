"""Small benchmarks: their configuration, and the tool as a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megadistill.config import Config

TOOL = Path(__file__).resolve().parents[2] / "tools/bench.py"


def config(folder: Path) -> Config:
    return Config.model_validate(
        {
            "data": {
                "files": [str(folder / "text.jsonl")],
                "dir": str(folder / "tokens"),
                "seq_len": 32,
                "block_size": 8,
            },
            "teacher": {"model": str(folder / "teacher")},
            "cache": {"dir": str(folder / "cache"), "min_free": 0},
            "targets": {"tau": 0.1},
        }
    )


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, TOOL, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
