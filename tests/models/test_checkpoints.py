"""Model folders that are damaged, incomplete or unusual: refused by name, or loaded right.

Each case changes a copy of a complete folder. It is given as teacher and as student: either the
checks before a run refuse it and nothing is written, or the loaded model gives the logits that
plain transformers gives for the untouched folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megadistill.config import StudentConfig, TeacherConfig
from megadistill.errors import ConfigError
from megadistill.models.model_files import ModelFiles
from megadistill.models.pretrained import load_pretrained
from megadistill.preflight.model_checks import check_complete, check_model
from tests.models.made import tiny_llama

Tensors = dict[str, torch.Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    return Path(tiny_llama(tmp_path_factory.mktemp("complete")))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return Path(tiny_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True))


def weights(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    """A case that changes the tensors."""

    def changed(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        replaced = change(tensors)
        save_file(tensors if replaced is None else replaced, folder / SINGLE, {"format": "pt"})

    return changed


def settings(**changes: Any) -> Callable[[Path], None]:
    """A case that changes config.json."""

    def changed(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return changed


def prefixed(prefix: str) -> Callable[[Path], None]:
    return weights(lambda tensors: {prefix + name: t for name, t in tensors.items()})


def without(*names: str) -> Callable[[Path], None]:
    def drop(tensors: Tensors) -> Tensors:
        kept = {n: t for n, t in tensors.items() if not any(part in n for part in names)}
        assert len(kept) < len(tensors)
        return kept

    return weights(drop)


def also(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32):
    return weights(lambda tensors: tensors | {name: torch.ones(shape, dtype=dtype)})


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> Tensors:
        assert name in tensors
        return tensors | {name: tensor}

    return weights(change)


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def sharded(folder: Path) -> None:
    """Two shards and an index, as save_pretrained writes a large model."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
    index = {n: file for file, part in files.items() for n in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / SINGLE).unlink()


def indexed(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        sharded(folder)
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return changed


def both(*steps: Callable[[Path], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        for step in steps:
            step(folder)

    return changed


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


def cut(name: str, length: int) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(length)

    return changed


def overwritten(name: str, content: bytes) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.write(content)

    return changed


def layer_2(tensors: Tensors) -> Tensors:
    return tensors | {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }


def next_token_layer(tensors: Tensors) -> Tensors:
    """A layer for multi-token prediction, as DeepSeek-V3 keeps it behind its last layer."""
    return layer_2(tensors) | {"model.layers.2.eh_proj.weight": torch.ones(64, 128)}


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "prefix of torch.compile": (prefixed("_orig_mod."), "save it without the prefix _orig_mod."),
    "prefix of DDP": (prefixed("module."), "save it without the prefix module."),
    "prefix of peft": (prefixed("base_model.model."), "without the prefix base_model.model."),
    "a layer is missing": (without("layers.1."), "lacks model.layers.1.input_layernorm.weight"),
    "a bias too many": (also("model.layers.0.self_attn.q_proj.bias", (64,)), "q_proj.bias, which"),
    "the head is missing": (without("lm_head"), "lacks lm_head.weight, which would be random"),
    "the embedding is missing": (without("embed_tokens"), "lacks model.embed_tokens.weight"),
    "a norm is missing": (without("model.norm"), "lacks model.norm.weight"),
    "all is missing": (weights(lambda t: {"a": torch.ones(1)}), "lacks lm_head.weight"),
    "no tensor at all": (weights(lambda t: {}), "lacks lm_head.weight"),
    "an empty tensor": (put(Q_PROJ, torch.zeros(0)), "zero_to_fp32"),
    "all tensors empty": (
        weights(lambda t: {n: torch.zeros(0) for n in t}),
        "has shape [0], expected [512, 64]",
    ),
    "a transposed tensor": (
        put("model.layers.0.mlp.up_proj.weight", torch.ones(64, 128)),
        "up_proj.weight has shape [64, 128], expected [128, 64]",
    ),
    "a larger vocabulary": (settings(vocab_size=520), "has shape [512, 64], expected [520, 64]"),
    "wider than it says": (settings(intermediate_size=96), "expected [96, 64]"),
    "more layers than it says": (weights(layer_2), "has model.layers.2.input_layernorm.weight"),
    "fewer layers than it says": (settings(num_hidden_layers=3), "lacks model.layers.2.input"),
    "biases that config.json wants": (settings(attention_bias=True), "self_attn.k_proj.bias"),
    "untied by config.json": (
        both(without("lm_head"), settings(tie_word_embeddings=False)),
        "lacks lm_head.weight",
    ),
    "another architecture": (settings(model_type="gpt2", architectures=["GPT2LMHeadModel"]), ""),
    "an eight-bit tensor": (
        put(Q_PROJ, torch.ones(64, 64, dtype=torch.int8)),
        "q_proj.weight has dtype I8",
    ),
    "shards without an index": (
        both(sharded, lambda f: (f / INDEX).unlink()),
        "has model-1.safetensors, and neither model.safetensors nor",
    ),
    "consolidated alone": (
        renamed(SINGLE, "consolidated.safetensors"),
        "has consolidated.safetensors, and neither",
    ),
    "a shard is missing": (
        both(sharded, lambda f: (f / "model-2.safetensors").unlink()),
        "lacks 1 of 2 files, model-2.safetensors",
    ),
    "an index of another folder": (
        indexed(lambda m: m.update({Q_PROJ: "../model-1.safetensors"})),
        "names '../model-1.safetensors'",
    ),
    "an empty index": (indexed(lambda m: m.clear()), "weight_map is empty"),
    "an index that is no index": (
        both(sharded, text(INDEX, "[1, 2]")),
        "index.json: cannot be read",
    ),
    "an index without a map": (both(sharded, text(INDEX, "{}")), "KeyError: 'weight_map'"),
    "an index of numbers": (
        both(sharded, text(INDEX, '{"weight_map": {"a": 1}}')),
        "names 1, expected",
    ),
    "an index that forgets a shard": (
        indexed(lambda m: [m.pop(n) for n in list(m) if m[n] == "model-2.safetensors"]),
        "lacks ",
    ),
    "cut short": (cut(SINGLE, 100_000), "lacks the end of model.safetensors"),
    "cut within the header": (cut(SINGLE, 100), "not a safetensors file"),
    "of no bytes": (cut(SINGLE, 0), "not a safetensors file"),
    "a header of a petabyte": (overwritten(SINGLE, b"\xff" * 7), "not a safetensors file"),
    "a header that is no JSON": (overwritten(SINGLE, b"\x20" + b"\0" * 7 + b"#" * 9), "not a safe"),
    "a header of other things": (
        lambda f: (f / SINGLE).write_bytes(b"\x0b" + b"\0" * 7 + b'{"a": [12]}'),
        "not a safetensors file",
    ),
    "a page of HTML": (text(SINGLE, "<html>not found</html>"), "not a safetensors file"),
    "a pointer of Git LFS": (
        text(SINGLE, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        "not a safetensors file",
    ),
    "a folder in place of a file": (
        both(lambda f: (f / SINGLE).unlink(), lambda f: (f / SINGLE).mkdir()),
        "holds no weights",
    ),
    "pickled weights": (renamed(SINGLE, "pytorch_model.bin"), "which can run code"),
    "config.json is no JSON": (text("config.json", "{"), "config.json: cannot be read"),
    "config.json is a list": (text("config.json", "[]"), "expected an object, found a list"),
    "config.json is missing": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config.json names no model": (text("config.json", "{}"), "is no causal language model"),
    "an unknown model type": (
        settings(model_type="llamma", architectures=["LlammaForCausalLM"]),
        "is no causal language model",
    ),
    "a field of another type": (settings(num_hidden_layers="two"), ""),
    "heads that do not divide": (settings(num_attention_heads=5), ""),
    "quantised by its own words": (
        settings(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised (quant_method gptq",
    ),
}

RIGHT: dict[str, Callable[[Path], Any]] = {
    "as it is": lambda f: None,
    "in shards": sharded,
    "an optimizer's file beside it": lambda f: save_file(
        {"step": torch.ones(2)}, f / "optimizer.safetensors"
    ),
    "consolidated beside it": lambda f: shutil.copy(f / SINGLE, f / "consolidated.safetensors"),
    "old shards beside the single file": both(
        lambda f: shutil.copytree(f, f.with_name("two")) and sharded(f.with_name("two")),
        lambda f: [shutil.copy(p, f) for p in f.with_name("two").glob("model-*")],
    ),
    "a shard of another model beside the index": both(
        sharded, lambda f: save_file({Q_PROJ: torch.zeros(64, 64)}, f / "model-3.safetensors")
    ),
    "pickled weights beside it": text("pytorch_model.bin", "no pickle at all"),
    "a value head": also("v_head.summary.weight", (1, 64)),
    "rotary frequencies of old": also("model.layers.0.self_attn.rotary_emb.inv_freq", (8,)),
    "a layer for multi-token prediction": weights(next_token_layer),
    "an unknown key in config.json": settings(something_new={"a": [1, None]}),
    "no architectures in config.json": settings(architectures=None),
}


def sections(folder: Path) -> list[tuple[str, TeacherConfig | StudentConfig]]:
    return [
        ("teacher.model", TeacherConfig(model=str(folder), dtype="float32")),
        ("student.model", StudentConfig(model=str(folder))),
    ]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_anything_is_loaded(case, complete, tmp_path):
    spoil, said = REFUSED[case]
    folder = tmp_path / "model"
    shutil.copytree(complete, folder)
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    for key, section in sections(folder):
        with pytest.raises(ConfigError) as caught:
            check(section, key)
        line = str(caught.value)
        assert said in line
        assert all(one.startswith(f"{key}: ") and len(one) < 700 for one in line.splitlines())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", RIGHT)
def test_loaded_as_plain_transformers_loads_the_untouched_folder(case, complete, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(complete, folder)
    RIGHT[case](folder)
    same_logits(folder, complete)


@pytest.mark.parametrize("drop", [(), ("lm_head",)])
def test_a_declared_tie_needs_one_of_its_tensors(tied, drop, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tied, folder)
    if drop:
        weights(lambda t: {n: x for n, x in t.items() if "lm_head" not in n})(folder)
    same_logits(folder, tied)
    without("embed_tokens")(folder)
    with pytest.raises(ConfigError, match=r"embed_tokens|lm_head"):
        check(TeacherConfig(model=str(folder)), "teacher.model")


def check(section: TeacherConfig | StudentConfig, key: str) -> ModelFiles:
    model = check_model(section, key, with_weights=True)
    check_complete(section, model)
    return model


def same_logits(folder: Path, truth: Path) -> None:
    tokens = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(truth, dtype=torch.float32)(tokens).logits
        for key, section in sections(folder):
            model = check(section, key)
            assert model.parameters() == (parameters(folder), True)
            loaded = load_pretrained(section, key=key, dtype=torch.float32)
            torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=1e-5)


def parameters(folder: Path) -> int:
    names = {SINGLE}
    if not (folder / SINGLE).exists():
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    return sum(t.numel() for name in names for t in load_file(folder / name).values())
