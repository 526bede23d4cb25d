"""Reading a hostfile: what DeepSpeed drops in silence is a line with its number."""

from __future__ import annotations

import re

import pytest

from megadistill.errors import ConfigError
from megadistill.launching.hostfile import Host, read_hostfile


def test_a_hostfile_of_deepspeed_is_read(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# a comment\nworker-1 slots=8\n\n  10.0.0.7  slots=4  # the old one\n")
    assert read_hostfile(path) == [Host("worker-1", 8), Host("10.0.0.7", 4)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a slots=1\nb slots=0\n", "hosts:2: b has slots=0, expected at least 1: .*"),
        ("a slots=1\n\na slots=2\n", "hosts:3: a is there twice: .*"),
        ("a\n", "hosts:1: found 'a', expected `name slots=N`"),
        ("a slots=two\n", "hosts:1: found 'a slots=two', expected `name slots=N`"),
        ("a slots=1 max=2\n", "hosts:1: found 'a slots=1 max=2', expected `name slots=N`"),
        ("a slots=-1\n", "hosts:1: found 'a slots=-1', expected `name slots=N`"),
        ("# nobody\n", "hosts: names no host, expected lines of `name slots=N`"),
    ],
)
def test_each_mistake_names_its_line(tmp_path, text, line):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_hostfile(path)
    assert re.fullmatch(re.escape(f"{tmp_path}/") + line, str(error.value))


def test_all_mistakes_are_found_at_once(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a slots=0\nb\nc slots=1\nc slots=1\n")
    with pytest.raises(ConfigError) as error:
        read_hostfile(path)
    assert len(str(error.value).splitlines()) == 3


def test_a_missing_hostfile_and_a_folder_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: No such file or directory, .* --hostfile"):
        read_hostfile(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"Is a directory, .* --hostfile"):
        read_hostfile(tmp_path)
