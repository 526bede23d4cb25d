"""The key reference, and that configs/README.md has the one of this code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.config import all_keys
from megadistill.config.key_reference import BEGIN, END, reference, updated
from megadistill.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


def tool(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/config_reference.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_key_has_a_row_with_type_default_and_sentence():
    text = reference()
    for key in all_keys():
        section, name = key.split(".")
        part = text.partition(f"### `{section}`\n")[2].partition("### ")[0]
        (row,) = [line for line in part.splitlines() if line.startswith(f"| `{name}` |")]
        assert len(row.split(" | ")) == 4
        assert not row.endswith("|  |")
    assert "| `tau` | number > 0 <= 1 | `0.06` |" in text
    assert "| `model` | text | required |" in text
    assert "### `deepspeed`" in text


def test_the_tool_updates_and_checks_what_lies_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert tool("--check", str(readme)).returncode == 1
    assert tool("--update", str(readme)).returncode == 0
    assert tool("--check", str(readme)).returncode == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n### `data`")
    assert text.endswith(f"\n{END}\nafter\n")
    assert updated(text, file="README.md") == text
    assert tool().stdout == reference()


def test_a_file_without_the_markers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="once each"):
        updated("nothing", file="x.md")
    done = tool("--update", str(tmp_path / "none.md"))
    assert done.returncode == 2
    assert "none.md: cannot be read" in done.stderr


def test_the_reference_in_configs_is_up_to_date():
    readme = REPOSITORY / "configs" / "README.md"
    assert updated(readme.read_text(), file="configs/README.md") == readme.read_text(), (
        "run: python tools/config_reference.py --update configs/README.md"
    )
