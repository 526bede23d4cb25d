"""Plants one mutant in a copy of the repository and runs the tests that mirror its subpackage.

    make test-long AREA=mutants

Outcomes go to `runs/mutants.jsonl`, a line each, with a checksum of the mutant, of the mutated file
and of its tests: a run that was interrupted resumes, and what has changed since is done again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import xxhash

from tests.mutants.planted import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "runs" / "mutants.jsonl"
LIMIT_S = 600  # a mutant that hangs its tests is noticed
_FAILED = 1  # pytest's exit code where tests ran and one failed


def places(mutant: Mutant, root: Path = ROOT) -> list[Path]:
    """Each file with the mutant's old text, as often as it holds it."""
    folder = root / "megadistill" / mutant.area
    inner = {m.area for m in MUTANTS if m.area.startswith(f"{mutant.area}/")}
    found = []
    for file in sorted(folder.rglob("*.py")):
        if not any((root / "megadistill" / area) in file.parents for area in inner):
            found += [file] * file.read_text("utf-8").count(mutant.old)
    return found


def killed(mutant: Mutant, *, folder: Path, record: Path = RECORD) -> dict[str, Any]:
    """The outcome: recorded, or that of the tests in a copy of the repository below `folder`."""
    key = _key(mutant)
    for line in record.read_text().splitlines() if record.exists() else []:
        known = json.loads(line)
        if known["key"] == key:
            return known
    outcome = {"name": mutant.name, "area": mutant.area, "key": key, **_run(mutant, folder)}
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a") as file:
        file.write(json.dumps(outcome) + "\n")
    return outcome


def copied(folder: Path) -> Path:
    """A copy of the repository's files in `folder`."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def _run(mutant: Mutant, folder: Path) -> dict[str, Any]:
    (file,) = places(mutant, folder)
    source = file.read_text("utf-8")
    file.write_text(source.replace(mutant.old, mutant.new), "utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-m",
        "not long",
        "-p",
        "no:cacheprovider",
    ]
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *mutant.tests],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        code, lines = done.returncode, done.stdout.splitlines()
        shown = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-3:]
    except subprocess.TimeoutExpired:
        code, shown = _FAILED, [f"stopped after {LIMIT_S} s"]
    finally:
        file.write_text(source, "utf-8")
    if code not in (0, _FAILED):
        raise RuntimeError(f"{mutant.name}: pytest ended with {code}: {shown}")
    return {"killed": code == _FAILED, "seconds": round(time.monotonic() - began, 1), "by": shown}


def _key(mutant: Mutant) -> str:
    digest = xxhash.xxh3_64("\0".join((mutant.old, mutant.new, *mutant.tests)).encode())
    digest.update(places(mutant)[0].read_bytes())
    for name in mutant.tests:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
