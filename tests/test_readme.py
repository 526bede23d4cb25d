"""The README's commands are commands: they parse, and what they name is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.blocks import open_store
from megadistill.config import load_config
from megadistill.config.find import find_config
from tests.train.stores import make_store

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """The indented commands, with continued lines joined, without comments."""
    text = README.replace("\\\n", " ")
    lines = [
        line[4:] for line in text.splitlines() if re.match(r" {4}(deepspeed|python|make) ", line)
    ]
    return [" ".join(line.split("  #")[0].split()) for line in lines]


def test_the_first_commands_stand_before_line_25():
    top = "\n".join(README.splitlines()[:25])
    assert "make demo" in top
    assert "make test" in top


def test_there_are_commands_for_both_programs_and_the_tools():
    told = " ".join(commands())
    for name in ("launch/generate.py", "launch/train.py", "tools/inspect_cache.py", "make demo"):
        assert name in told


@pytest.mark.parametrize("command", commands())
def test_a_command_names_what_is_there(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    behind = words[words.index(script) + 1 :]
    name = behind[behind.index("--config") + 1] if "--config" in behind else None
    load_config(name, [word for word in behind if "=" in word and not word.startswith("--")])


def test_the_table_of_the_repository_names_what_is_there():
    for row in re.findall(r"^\| `(\w+/)` \| (.*) \|$", README, re.MULTILINE):
        folder, told = row
        assert (ROOT / folder).is_dir()
        for name in re.findall(r"`(\w+\.(?:py|yaml))`", told):
            assert (ROOT / folder / name).is_file(), name


def test_named_configurations_are_shipped():
    for name in set(re.findall(r"configs/(\w+\.yaml)", README)):
        assert find_config(name).is_file()


def test_the_lines_that_read_a_store_with_streaming_read_one(tmp_path):
    lines = re.findall(r"^ {4}(.*load_streaming.*)$", README, re.MULTILINE)
    path = make_store(tmp_path / "cache", sequences=12)
    script = "\n".join(lines).replace("runs/zero3/cache", path)
    script += "\nprint(len(dataset), *(sum(sample['tokens'].tolist()) for sample in dataset))\n"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    expected = [12, *(int(sample["tokens"].sum()) for sample in open_store(path))]
    assert run.returncode == 0, run.stderr
    assert [int(word) for word in run.stdout.split()] == expected
