"""Weights that transformers would convert are made when a layer is called, the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadistill.config import TeacherConfig
from megadistill.models.pretrained import load_pretrained
from megadistill.models.probe_tokens import Probe
from megadistill.teacher import reference as reference_module
from megadistill.teacher.deferred import Deferred, is_deferred, load_deferred, values
from megadistill.teacher.reference import Reference
from tests.memory import MIB, PeakMemory
from tests.models.architectures import ARCHITECTURES, VOCAB, save_architecture, save_random
from tests.models.hybrids import HYBRIDS
from tests.models.made import tiny_llama
from tests.ranks import run_ranks
from tests.teacher.test_precision import MODELS

KEY = "teacher.model"
CPU = torch.device("cpu")
STACKED = ["mixtral", "qwen3_moe", "deepseek_v3"]  # by transformers 5
# Experts, a tied and scaled embedding, a bias on the head, a state.
SPECIAL = ["llama", "gpt_oss", "gemma3_text", "phi", "gpt2", *sorted({"qwen3_next"} & set(HYBRIDS))]


def tokens(vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.from_numpy(Probe.of(seq_len=48, vocab_size=vocab_size).tokens_T)


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [(name, "bfloat16") for name in STACKED + SPECIAL] + [(name, "float32") for name in STACKED],
)
def test_the_reference_is_the_one_that_is_loaded_whole(tmp_path, monkeypatch, model_type, dtype):
    attention = (ARCHITECTURES | HYBRIDS)[model_type].attention
    folder = save_architecture(tmp_path / "m", model_type)
    section = TeacherConfig(model=folder, dtype=dtype, attention=attention)
    found = Reference(section, tokens(), key=KEY, device=CPU)
    if dtype != "float32":
        assert is_deferred(found.model)
    monkeypatch.setattr(reference_module, "load_deferred", load_pretrained)
    whole = Reference(section, tokens(), key=KEY, device=CPU)
    assert torch.equal(found.hidden_TH, whole.hidden_TH)
    assert torch.equal(found.exact_TH, whole.exact_TH)
    for hidden in (found.hidden_TH, found.exact_TH):
        ours, theirs = (r.log_probs(hidden, vocab_size=VOCAB) for r in (found, whole))
        assert torch.equal(ours, theirs)
    assert_same(found.model, whole.model)


def assert_same(found: Any, whole: Any) -> None:
    expected = dict(whole.named_parameters()) | dict(whole.named_buffers())
    ours = dict(found.named_parameters()) | dict(found.named_buffers())
    assert list(ours) == list(expected)
    for name, tensor in ours.items():
        torch.testing.assert_close(values(tensor), expected[name].data, rtol=0, atol=0)


def test_what_stays_in_float32_has_its_values_at_once(tmp_path):
    model_type, settings = MODELS["ernie4_5_moe"]
    folder = save_random(tmp_path / "m", model_type, settings, seed=0)
    file = Path(folder) / "model.safetensors"
    stored = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    section = TeacherConfig(model=folder, dtype="bfloat16")
    found = load_deferred(section, key=KEY, dtype=torch.bfloat16)
    whole = load_pretrained(section, key=KEY, dtype=torch.bfloat16)
    assert_same(found, whole)
    kept = {name: p for name, p in whole.named_parameters() if p.dtype == torch.float32}
    assert kept
    for name, parameter in kept.items():
        assert torch.equal(found.get_parameter(name), parameter)


def test_what_transformers_does_not_convert_stays_mapped(tmp_path):
    folder = tiny_llama(tmp_path / "m", tie_word_embeddings=True)
    section = TeacherConfig(model=folder, dtype="float32")
    model = load_deferred(section, key=KEY, dtype=torch.float32)
    assert not is_deferred(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, load_pretrained(section, key=KEY, dtype=torch.float32))


def test_models_with_code_of_their_own_are_loaded_whole(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    section = TeacherConfig(model=folder, dtype="bfloat16", trust_remote_code=True)
    model = load_deferred(section, key=KEY, dtype=torch.bfloat16)
    assert not is_deferred(model)
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_recorded_operations_are_repeated_on_the_values_and_on_rows():
    parts = [torch.arange(12.0).view(4, 3) + n for n in range(2)]
    first, second = (Deferred.of(part) for part in parts)
    cast = first[...].to(device="cpu", dtype=torch.bfloat16)
    stacked = torch.cat([torch.stack([first, second]), second[None]])
    chunks = stacked.transpose(1, 2).chunk(3)
    rows = torch.tensor([2, 0])
    assert torch.equal(cast.values(rows), parts[0].bfloat16()[rows])
    expected = torch.stack([*parts, parts[1]])
    assert torch.equal(stacked.values(slice(1, 3)), expected[1:3])
    assert torch.equal(chunks[1].values(), expected[1:2].transpose(1, 2))


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.mul_(2),
        lambda t: t.__setitem__(0, 1.0),
        lambda t: torch.empty(4, device="meta").copy_(t),
    ],
)
def test_a_write_that_cannot_be_recorded_is_refused(write):
    with pytest.raises(NotImplementedError, match="whose values are not made yet"):
        write(Deferred.of(torch.ones(4)))


SIZES = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def peak(mesh, folders: list[str], dtype: str) -> tuple[float, float]:
    """MiB that the reference takes for the last of `folders`, and those of its layers."""
    for folder in folders:  # the first one loads libraries
        with PeakMemory() as memory:
            section = TeacherConfig(model=folder, dtype=dtype)
            found = Reference(section, tokens(), key=KEY, device=mesh.device)
            for hidden in (found.hidden_TH, found.exact_TH):
                found.log_probs(hidden, vocab_size=VOCAB)
    layers = sum(p.nbytes for layer in found.model.model.layers for p in layer.parameters())
    return memory.taken, layers / MIB


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_layers_are_held_at_most_where_experts_are_stacked_and_cast(tmp_path, dtype):
    folders = [
        save_random(
            tmp_path / str(layers), "mixtral", {**SIZES, "num_hidden_layers": layers}, seed=0
        )
        for layers in (1, 12)
    ]
    [(taken, layers)] = run_ranks(
        1, "tests.teacher.test_deferred:peak", folders=folders, dtype=dtype
    )
    layer = layers / 12 * (1 if dtype == "float32" else 2)  # in float32
    assert taken <= 2 * layer + 32 < layers
