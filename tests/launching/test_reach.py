"""What a host says of itself decides whether it takes part."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from megadistill.launching.hostfile import Host
from megadistill.launching.probe import code_hash, facts
from megadistill.launching.reach import Answer, mistakes


def answer(name: str, slots: int = 1, **different: Any) -> Answer:
    return Answer(Host(name, slots), facts() | {"machine": [name, "boot", "pid"]} | different)


def test_hosts_of_one_version_with_their_accelerators_take_part() -> None:
    assert mistakes([answer("a", accelerators=None), answer("b", 8, accelerators=8)]) == []


def test_one_machine_under_two_names_is_named_once() -> None:
    same = ["worker", "boot", "pid"]
    assert mistakes([answer("a", machine=same), answer("b", machine=same), answer("c")]) == [
        "b: is the machine that a is: keep one of the two names"
    ]


def test_other_code_and_too_few_accelerators_are_named() -> None:
    other, few = mistakes([answer("a", code="0"), answer("b", 8, accelerators=4)])
    assert other.startswith("a: ")
    assert "holds other code than here" in other
    assert few == "b: slots=8, but torch finds 4 accelerators there"


def test_a_host_that_does_not_answer_is_no_mistake_and_one_without_interpreter_is() -> None:
    away = Answer(Host("a", 1), None, "no answer within 60 s", unreachable=True)
    lacks = Answer(Host("b", 1), None, "has no interpreter /usr/bin/python9")
    assert mistakes([away, lacks]) == ["b: has no interpreter /usr/bin/python9"]


def test_the_hash_sees_names_and_contents(tmp_path) -> None:
    hashes = set()
    for name, text in (("a.py", "1"), ("b.py", "1"), ("b.py", "2")):
        package = tmp_path / f"{name}-{text}"
        package.mkdir()
        (package / name).write_text(text)
        (package / "notes.txt").write_text(name + text)
        hashes.add(code_hash(package))
    assert len(hashes) == 3
    assert code_hash() == code_hash()


def test_the_probe_prints_a_line_of_json_and_imports_no_torch() -> None:
    ask = (
        "import sys; from megadistill.launching import probe; probe.main(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    line, torch = done.stdout.splitlines()
    assert json.loads(line)["code"] == code_hash()
    if json.loads(line)["accelerators"] is None:
        assert torch == "False"
