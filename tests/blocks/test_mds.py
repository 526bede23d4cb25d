"""streaming is imported with torchvision absent, fine and broken: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BROKEN = {
    "__init__.py": "from torchvision import extension\n"
    "raise RuntimeError('operator torchvision::nms does not exist')\n",
    "extension.py": "",
}
# What streaming.vision takes from torchvision.
FINE = {
    "__init__.py": "",
    "datasets.py": "class VisionDataset: ...\nclass CIFAR10: ...\n",
    "transforms/__init__.py": "",
    "transforms/functional.py": "def to_tensor(image): return image\n",
}
WRITE_A_SHARD = """
import sys
import numpy as np
from megadistill.blocks.mds import load_streaming, mds_writer

folder = sys.argv[1]
with mds_writer()(out=folder, columns={"tokens": "ndarray:uint32:4"}, size_limit=None) as writer:
    writer.write({"tokens": np.arange(4, dtype=np.uint32)})
sample = load_streaming().LocalDataset(folder)[0]
assert sample["tokens"].tolist() == [0, 1, 2, 3], sample
assert mds_writer() is mds_writer()
"""
USE_TRANSFORMERS = """
from transformers import AutoModelForCausalLM, LlamaConfig

tiny = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
AutoModelForCausalLM.from_config(tiny)
"""


def install_torchvision(folder: Path, files: dict[str, str]) -> None:
    """A package that is found as torchvision is, with its entry in the list of installed ones."""
    for name, text in files.items():
        path = folder / "torchvision" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    metadata = folder / "torchvision-0.99.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n")


def run(script: str, first_on_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a new interpreter that looks for packages in `first_on_path` first."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": f"{first_on_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    return folder


def test_a_torchvision_that_works_is_left_alone(packages: Path, tmp_path: Path) -> None:
    install_torchvision(packages, FINE)
    check = "import streaming.vision\nassert streaming.vision.StreamingImageNet\n"
    done = run(WRITE_A_SHARD + check, packages, str(tmp_path / "shard"))
    assert done.returncode == 0, done.stderr


def test_without_torchvision_shards_are_written_and_vision_says_why_it_is_not_there(
    packages: Path, tmp_path: Path
) -> None:
    # None in sys.modules is what an absent package looks like, also where one is installed.
    absent = "import sys\nsys.modules['torchvision'] = None\n"
    check = """
try:
    import streaming.vision
except ModuleNotFoundError as error:
    assert "torchvision" in str(error), error
else:
    raise AssertionError("the placeholder is still there")
"""
    script = absent + WRITE_A_SHARD + check + USE_TRANSFORMERS
    done = run(script, packages, str(tmp_path / "shard"))
    assert done.returncode == 0, done.stderr


def test_a_broken_torchvision_breaks_neither_streaming_nor_transformers(
    packages: Path, tmp_path: Path
) -> None:
    install_torchvision(packages, BROKEN)
    check = "assert 'torchvision.extension' not in sys.modules\n"
    script = WRITE_A_SHARD + USE_TRANSFORMERS + check
    done = run(script, packages, str(tmp_path / "shard"))
    assert done.returncode == 0, done.stderr
    assert "torchvision is installed but cannot be imported" in done.stderr
    premise = run("import streaming", packages)
    assert "operator torchvision::nms does not exist" in premise.stderr


@pytest.mark.long
def test_a_broken_torchvision_is_hidden_whoever_imports_transformers(packages: Path) -> None:
    install_torchvision(packages, BROKEN)
    done = run("import megadistill\n" + USE_TRANSFORMERS, packages)
    assert done.returncode == 0, done.stderr
    premise = run(USE_TRANSFORMERS, packages)
    assert premise.returncode != 0
