"""What is in the repository, and what importing the package costs."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TOP_LEVEL = {
    "megadistill",
    "launch",
    "configs",
    "tests",
    "tools",
    "setup.py",
    "README.md",
    "Makefile",
    "pyproject.toml",
    "requirements.lock",
    "overrides.txt",
    "LICENSE",
    "CITATION.cff",
    "CONTRIBUTING.md",
    ".pre-commit-config.yaml",
    ".github",
    ".ci",
    ".gitignore",
}

# A folder of somebody's machine. What every Linux has (tmp, dev, proc, usr) is not one.
MACHINE_PATH = re.compile(r"(?<![\w./~}])/(?:home|root|Users|opt|work)/\w")
# Which registry serves the packages is the machine's business.
REGISTRY = re.compile(r"https?://[\w.-]*(?:pypi|pythonhosted|download\.pytorch|conda)\b")

# A docstring says first what the thing is or does.
NO_SUBJECT = {
    "What",
    "Of",
    "It",
    "Its",
    "They",
    "Their",
    "This",
    "These",
    "That",
    "Those",
    "There",
    "We",
    "Our",
}

# Modules that take seconds to import, or that a machine for inspecting need not have.
HEAVY = {"torch", "streaming", "transformers", "datasets", "deepspeed", "pyarrow", "matplotlib"}


def tracked_files() -> Iterator[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            yield Path(name)


def test_the_top_level_holds_what_the_design_names() -> None:
    found = {file.parts[0] for file in tracked_files()}
    assert found <= TOP_LEVEL


def test_no_file_names_a_folder_of_one_machine_or_the_host_of_a_registry() -> None:
    found = [
        f"{file}:{number}: {line.strip()}"
        for file in tracked_files()
        if file.suffix not in {".mds", ".bin", ".png", ".parquet"}
        for number, line in enumerate((ROOT / file).read_text("utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line) or REGISTRY.search(line)
    ]
    assert found == []


def test_code_is_plain_ascii_except_for_the_texts_that_tests_use() -> None:
    found = [
        str(file)
        for file in tracked_files()
        if file.suffix == ".py"
        and file.parts[0] != "tests"
        and not (ROOT / file).read_bytes().isascii()
    ]
    assert found == []


def test_docstrings_begin_with_their_subject() -> None:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [
        f"{file}:{node.body[0].lineno}: {text.splitlines()[0]}"
        for file in tracked_files()
        if file.suffix == ".py" and file.parts[0] in {"megadistill", "launch", "tools"}
        for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8")))
        if isinstance(node, documented) and (text := ast.get_docstring(node))
        if re.split(r"\W", text, maxsplit=1)[0] in NO_SUBJECT
    ]
    assert found == []


def test_docstrings_name_modules_that_exist() -> None:
    files = [f"/{file.as_posix()}" for file in tracked_files()]
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [
        f"{file}: {name}"
        for file in tracked_files()
        if file.suffix == ".py" and file.parts[0] in {"megadistill", "launch", "tools"}
        for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8")))
        if isinstance(node, documented)
        for name in re.findall(r"(?<![\w/.])((?:\w+/)*\w+\.py)\b", ast.get_docstring(node) or "")
        if not any(each.endswith(f"/{name}") for each in files)
    ]
    assert found == []


def test_every_package_folder_is_installed() -> None:
    modules = {(ROOT / file).parent for file in tracked_files() if file.parts[0] == "megadistill"}
    assert [str(folder) for folder in modules if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    "module", ["megadistill", "megadistill.config", "megadistill.errors", "megadistill.targets"]
)
def test_importing_costs_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert HEAVY.intersection(loaded) == set()


def test_the_lock_pins_every_requirement_once_and_no_build_of_one_machine() -> None:
    for lock in (ROOT / "requirements.lock", ROOT / "tests" / "transformers-4.lock"):
        lines = [line for line in lock.read_text().splitlines() if line and line[0] != "#"]
        names = [line.partition("==")[0] for line in lines]
        assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", line) for line in lines), lock
        assert len(names) == len(set(names)), lock
        assert {"torch", "uv", "deepspeed", "mosaicml-streaming", "ninja"} <= set(names), lock
        assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))], lock


def test_both_locks_have_the_versions_they_are_there_for() -> None:
    pins = [
        dict(line.split("==") for line in lock.read_text().splitlines() if "==" in line)
        for lock in (ROOT / "requirements.lock", ROOT / "tests" / "transformers-4.lock")
    ]
    assert pins[0]["transformers"].startswith("5.")
    assert "torchvision" not in pins[0]
    assert pins[1]["transformers"].startswith("4.57.")
    # Plain pip brings one, and next to a CPU torch it is broken: that is what is tested there.
    assert "torchvision" in pins[1]
    assert pins[0]["torch"] == pins[1]["torch"]


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--directory", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_make_alone_lists_the_targets() -> None:
    shown = make(ROOT).stdout
    for target in ("demo", "test", "test-long", "test-transformers-4", "lint", "format", "venv"):
        assert re.search(rf"^  {target}\s+\w", shown, re.MULTILINE), shown


def test_make_refuses_what_is_not_a_new_enough_python(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock", "overrides.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    refused = make(tmp_path, "venv", "PYTHON=false")
    assert refused.returncode == 2
    assert "megadistill needs Python 3.11 or newer, and 'false' is not one" in refused.stderr
    assert not (tmp_path / ".venv").exists()


def test_plain_pip_is_spared_from_searching() -> None:
    """The bounds of setup.py hold for what plain pip ends up with, and overrides lift each."""
    bounded = set(re.findall(r'^    "([a-z-]+)[>=0-9.,]*<', (ROOT / "setup.py").read_text(), re.M))
    overruled = set(re.findall(r"^([a-z-]+)>=", (ROOT / "overrides.txt").read_text(), re.M))
    assert overruled <= bounded
    assert {"transformers", "datasets", "huggingface-hub", "tokenizers"} <= overruled


@pytest.mark.parametrize(
    ("environment", "lock"),
    [(".venv", "requirements.lock"), (".venv-transformers-4", "tests/transformers-4.lock")],
)
def test_an_environment_that_make_installed_has_the_versions_of_its_lock(
    environment: str, lock: str
) -> None:
    """An override had replaced the pin: a release of transformers changed the environment."""
    folders = [str(f) for f in (ROOT / environment).glob("lib/python3*/site-packages")]
    if not folders:
        pytest.skip(f"{environment} is not installed")
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / lock).read_text(), re.M))
    found = {
        re.sub(r"[-_.]+", "-", each.name).lower(): each.version.partition("+")[0]
        for each in importlib.metadata.distributions(path=folders)
    }
    assert len(pinned) > 80
    assert {name: found.get(name) for name in pinned} == pinned
