"""The wheel: what it holds, and the way from configs/own_text.yaml to a student with it alone."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from megadistill import __version__
from megadistill.config.yaml_reader import read_yaml
from tests.package.wheel import Environment, build_wheel
from tests.programs import ROOT

DEEPSPEED = ("deepspeed", "--num_gpus", "2", "--module", "megadistill")
MAKE_MODELS = """
import sys
import megadistill  # hides the torchvision that streaming brings and a CPU torch cannot load
from tests.models.made import tiny_model
for name, seed, hidden in (("teacher", 0, 64), ("student", 1, 32)):
    tiny_model(f"{sys.argv[1]}/{name}", seed=seed, hidden_size=hidden, max_position_embeddings=2048)
"""
LOAD = """
import megadistill, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("runs/own/train/model")
AutoTokenizer.from_pretrained("runs/own/train/model")
print(megadistill.__file__, transformers.__version__, model.config.hidden_size)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_configurations_types_and_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"megadistill-{__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        commands = archive.read(f"{info}/entry_points.txt").decode()
    shipped = {f"megadistill/configs/{file.name}" for file in (ROOT / "configs").glob("*.yaml")}
    assert len(shipped) >= 5
    assert shipped | {"megadistill/py.typed"} <= names
    assert not [name for name in names if not name.startswith(("megadistill/", "megadistill-"))]
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"peft", "tensorboard", "wandb", "trackio"} <= set(metadata.get_all("Provides-Extra"))
    assert "megadistill = megadistill.__main__:main" in commands


def test_the_citation_names_this_version() -> None:
    citation = read_yaml((ROOT / "CITATION.cff").read_text(), where="CITATION.cff")
    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")
    assert f"## {__version__}" in (ROOT / "megadistill" / "CHANGELOG.md").read_text()


def test_every_extra_that_a_message_names_is_there() -> None:
    extras = set(re.findall(r'^    "([\w-]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    named = {
        extra
        for file in (ROOT / "megadistill").rglob("*.py")
        for extra in re.findall(r"megadistill\[([\w-]+)\]", file.read_text())
    }
    assert named <= extras
    assert "peft" in named


def test_a_wheel_without_its_configurations_is_one_line(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "megadistill", tmp_path / "site" / "megadistill")
    done = subprocess.run(
        [sys.executable, "-m", "megadistill", "config"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: zero3\.yaml: no such configuration; looked for .*; this installation of "
        r"megadistill lacks its configurations, expected in .*site/megadistill/configs: install it "
        r"again\n",
        done.stderr,
    )


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory) -> Environment:
    """The wheel and what plain pip resolves for it."""
    made = Environment(tmp_path_factory.mktemp("environment") / "venv")
    made.pip(str(wheel))
    return made


def own_text(environment: Environment, place: Path) -> Path:
    """A folder with two models, a text, and own_text.yaml with their names in it."""
    python = str(environment.bin / "python")
    subprocess.run([python, "-c", MAKE_MODELS, str(place)], cwd=ROOT, check=True)
    words = (ROOT / "LICENSE").read_text().split()
    draw = random.Random(0)
    with (place / "text.jsonl").open("w") as file:
        for _ in range(400):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=300))}) + "\n")
    text = (ROOT / "configs" / "own_text.yaml").read_text()
    assert len(text.splitlines()) == 15
    for found, used in (
        (r"corpus/\*\.jsonl", "text.jsonl"),
        (r"HuggingFaceTB/SmolLM2-1\.7B", "teacher"),
        (r"HuggingFaceTB/SmolLM2-135M", "student"),
    ):
        text, count = re.subn(found, used, text)
        assert count == 1
    (place / "own.yaml").write_text(text)
    return place


def distil(environment: Environment, place: Path, *launcher: str, version: str) -> None:
    """From the text to a trained student that transformers loads."""
    run = environment.run
    shutil.rmtree(place / "runs", ignore_errors=True)
    command = launcher or ("megadistill",)
    assert "tau: 0.06" in run("megadistill", "config", "--config", "demo", cwd=place)
    assert "validated" in run(*command, "generate", "--config", "own.yaml", cwd=place)
    run(*command, "train", "--config", "own.yaml", cwd=place)
    facts = json.loads(
        run("megadistill", "inspect", "--config", "own.yaml", "--json", cwd=place).splitlines()[-1]
    )
    assert facts["complete"]
    steps = (place / "runs/own/train/metrics.jsonl").read_text().splitlines()
    assert len(steps) == -(-facts["num_sequences"] // 64)
    file, found, hidden = run("python", "-c", LOAD, cwd=place).splitlines()[-1].split()
    assert file.startswith(str(environment.bin.parent))
    assert found.startswith(version)
    assert hidden == "32"


@pytest.mark.long
def test_own_text_becomes_a_student_on_the_versions_that_pip_resolves(environment, tmp_path):
    place = own_text(environment, tmp_path)
    distil(environment, place, version="4.57.")
    distil(environment, place, *DEEPSPEED, version="4.57.")


@pytest.mark.long
def test_own_text_becomes_a_student_with_the_override_to_transformers_5(
    wheel, environment, tmp_path
):
    environment.pip("uv")
    environment.uv("--override", str(ROOT / "overrides.txt"), str(wheel))
    place = own_text(environment, tmp_path)
    distil(environment, place, version="5.")
    distil(environment, place, *DEEPSPEED, version="5.")
