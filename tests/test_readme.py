"""The READMEs: commands parse, configurations load, Python compiles, links lead somewhere."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from deepspeed.launcher.runner import parse_args as deepspeed_arguments
from torch.distributed.run import parse_args as torchrun_arguments

import megadistill
from megadistill.blocks import open_store
from megadistill.config import load_config
from megadistill.config.key_reference import BEGIN, END
from megadistill.errors import ConfigError
from tests.models.made import tiny_llama
from tests.programs import program
from tests.train.stores import VOCAB, make_store

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "launch", "tools", "megadistill", "tests")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"{folder}/README.md" for folder in FOLDERS))
README = (ROOT / "README.md").read_text()

# Commands of other programs, whose options are theirs.
OTHERS = {"pip", "source", "lm_eval", ".venv/bin/pre-commit"}
LANGUAGES = {"bash", "yaml", "python", "text", "toml"}


class Block(NamedTuple):
    """A fenced block: its file, the line of its first line, its language and its text."""

    file: str
    line: int
    language: str
    text: str


def text_of(file: str) -> str:
    return (ROOT / file).read_text()


def fenced(file: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text_of(file), re.MULTILINE | re.DOTALL)
    return [
        Block(file, text_of(file).count("\n", 0, match.start()) + 2, match[1], match[2])
        for match in found
    ]


BLOCKS = [block for file in DOCUMENTS for block in fenced(file)]


def named(language: str) -> list[Any]:
    return [
        pytest.param(block.text, id=f"{block.file}:{block.line}")
        for block in BLOCKS
        if block.language == language
    ]


def commands() -> list[Any]:
    """The lines of bash blocks, continued lines joined, without comments."""
    found = []
    for block in BLOCKS:
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.append(pytest.param(words, id=f"{block.file}: {' '.join(words)[:90]}"))
    return found


def anchors(file: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(file), flags=re.S), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def test_the_first_screen_has_the_first_command() -> None:
    lines = README.splitlines()
    first = next(number for number, line in enumerate(lines, 1) if line.startswith("make "))
    assert first < 12
    assert len(README.encode()) <= 10_000


def test_fenced_blocks_are_of_a_language_that_is_tested_here() -> None:
    assert {block.language for block in BLOCKS} == LANGUAGES
    for file in DOCUMENTS:
        assert text_of(file).count("```") == 2 * len(fenced(file)), file


def test_the_yaml_of_the_readme_is_a_configuration_of_15_lines_that_is_shipped() -> None:
    (shown,) = [block.text for block in BLOCKS if block[0] == "README.md" and block[2] == "yaml"]
    assert shown == (ROOT / "configs/own_text.yaml").read_text()
    assert len(shown.splitlines()) == 15


def test_every_shipped_configuration_has_a_row_and_loads() -> None:
    shipped = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+\.yaml)` \|", text_of("configs/README.md"), re.M)) == shipped
    for name in shipped:
        load_config(str(ROOT / "configs" / name))


@pytest.mark.parametrize("text", named("yaml"))
def test_yaml_sets_keys_that_exist_to_values_that_fit(text: str) -> None:
    """A part of a configuration is laid over configs/own_text.yaml."""
    overrides = [
        f"{section}.{key}={json.dumps(value)}"
        for section, keys in yaml.safe_load(text).items()
        for key, value in keys.items()
    ]
    load_config(str(ROOT / "configs/own_text.yaml"), overrides)


@pytest.mark.parametrize("words", commands())
def test_a_command_names_what_is_there_with_options_that_exist(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        assert re.search(rf"^{rest[0]}:", text_of("Makefile"), re.MULTILINE)
    elif program == "deepspeed":
        launched = deepspeed_arguments(rest)
        check_program([launched.user_script, *launched.user_args])
    elif program == "torchrun":
        launched = torchrun_arguments(rest)
        check_program([launched.training_script, *launched.training_script_args])
    elif program == "python":
        check_program(rest)
    else:
        assert program in OTHERS


def check_program(words: list[str]) -> None:
    """The program's own parser knows every argument, and its configuration loads."""
    script, *arguments = words
    said = io.StringIO()
    # A parser names an option that it does not know after all other mistakes. Benchmarks and the
    # demo report mistakes as argparse does.
    with contextlib.redirect_stderr(said), pytest.raises((ConfigError, SystemExit)) as mistake:
        program(script).main([*arguments, "--not_an_option"])
    if isinstance(mistake.value, ConfigError):
        expected = "command line: unrecognized arguments: --not_an_option: --help lists the options"
        assert str(mistake.value) == expected
    else:
        assert said.getvalue().endswith("error: unrecognized arguments: --not_an_option\n")
    name = arguments[arguments.index("--config") + 1] if "--config" in arguments else None
    load_config(name, [word for word in arguments if re.match(r"\w+\.[\w.]+=", word)])


@pytest.mark.parametrize("text", named("python"))
def test_python_compiles_and_uses_names_that_exist(text: str) -> None:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "megadistill" or hasattr(megadistill, node.attr), node.attr


@pytest.mark.parametrize("file", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_are_there(file: str) -> None:
    text = re.sub(r"```.*?```", "", text_of(file), flags=re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = ((ROOT / file).parent / path).resolve() if path else ROOT / file
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(str(found.relative_to(ROOT))), target


@pytest.mark.parametrize("file", DOCUMENTS)
def test_files_and_folders_of_the_repository_are_named_as_they_are(file: str) -> None:
    """Names in backticks that begin with a folder of the repository, or of the document."""
    text = re.sub(r"```.*?```", "", text_of(file), flags=re.S)
    for name in re.findall(r"`((?:\w+/)+(?:[\w-]+\.\w+)?)`", text):
        if name.partition("/")[0] in (*FOLDERS, ".ci", "tests"):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("file", "folder", "pattern"),
    [("tools/README.md", "tools", "*.py"), ("megadistill/README.md", "megadistill", "*/")],
)
def test_tables_have_a_row_for_each_tool_and_subpackage(
    file: str, folder: str, pattern: str
) -> None:
    rows = set(re.findall(r"^\| `(\w+(?:\.py|/))` \|", text_of(file), re.MULTILINE))
    there = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / folder).glob(pattern)
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there - {"__init__.py"} <= rows
    assert all((ROOT / folder / row).exists() for row in rows)


def test_every_promise_has_tests_that_exist() -> None:
    promises = README.partition("## What is promised")[2].partition("\n## ")[0]
    numbers = re.findall(r"^(\d+)\. ", promises, re.MULTILINE)
    rows = re.findall(r"^\| (\d+) \| `([\w/.]+)::(\w+)` \|$", text_of("tests/README.md"), re.M)
    assert {number for number, *_ in rows} == set(numbers)
    for _, file, name in rows:
        assert f"def {name}(" in text_of(f"tests/{file}"), name


def test_promises_stand_in_one_place() -> None:
    """Other documents name a promise by its number."""
    for words in ("1e-3 (bfloat16)", "bits (on a GPU", "Global batch g"):
        assert sum(text_of(file).count(words) for file in DOCUMENTS) == 1, words


def test_sentences_are_short() -> None:
    """Half of the sentences of each document have fewer than 16 words."""
    for file in DOCUMENTS:
        text = re.sub(r"```.*?```", "", text_of(file), flags=re.S)
        text = text.partition(BEGIN)[0] + text.partition(END)[2]
        prose = [part for part in text.split("\n\n") if not re.match(r"#|\||<!--", part.lstrip())]
        sentences = [
            sentence.split()
            for part in prose
            for sentence in re.split(r"(?<=[.:;])\s+|\n- |\n\d\. ", part)
        ]
        lengths = sorted(len(sentence) for sentence in sentences if sentence)
        assert lengths[len(lengths) // 2] < 16, file


def test_the_loop_of_the_readme_trains_a_student(tmp_path: Path) -> None:
    cache = make_store(tmp_path / "cache", sequences=4)
    student = tiny_llama(tmp_path / "student", vocab_size=VOCAB)
    (loop,) = [block.text for block in BLOCKS if block[0] == "README.md" and block[2] == "python"]
    assert len([line for line in loop.splitlines() if line]) <= 12
    loop = loop.replace("runs/own/cache", cache).replace("HuggingFaceTB/SmolLM2-135M", student)
    loop = loop.replace("max_steps=1000", "max_steps=2")
    loop += f"""
before = transformers.AutoModelForCausalLM.from_pretrained({student!r}).state_dict()
print(all((model.state_dict()[name] != before[name]).any() for name in before))
"""
    run(loop, shown="True")


def test_the_lines_that_read_a_store_with_streaming_read_one(tmp_path: Path) -> None:
    (script,) = [block.text for block in BLOCKS if "load_streaming" in block.text]
    path = make_store(tmp_path / "cache", sequences=12)
    script = script.replace("runs/zero3/cache", path)
    script += "\nprint(len(dataset), *(sum(sample['tokens'].tolist()) for sample in dataset))\n"
    expected = [12, *(int(sample["tokens"].sum()) for sample in open_store(path))]
    run(script, shown=" ".join(map(str, expected)))


def run(script: str, *, shown: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == shown
