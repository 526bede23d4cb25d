"""LoRA adapters in the place of a model: merged as peft merges them, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megadistill.cache.cache_recipe import model_identity
from megadistill.config import StudentConfig, TeacherConfig
from megadistill.data.tokenizer import open_tokenizer
from megadistill.errors import ConfigError
from megadistill.models.adapters import SETTINGS, WEIGHTS
from megadistill.models.pretrained import load_pretrained, model_settings
from megadistill.preflight.model_checks import check_complete, check_model
from tests.models.made import tiny_llama, tiny_tokenizer
from tests.ranks import run_ranks

peft = pytest.importorskip("peft")
# peft 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """base/, with a tokenizer, and adapter/, whose weights are far from zero."""
    folder = tmp_path_factory.mktemp("lora")
    base = tiny_llama(folder / "base")
    tiny_tokenizer(base)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["lm_head"],
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
        del name
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def place(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "here")
    change(tmp_path / "here", base_model_name_or_path=str(tmp_path / "here/base"))
    return tmp_path / "here"


def change(place: Path, **settings) -> None:
    path = place / "adapter" / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def sections(place: Path):
    folder = str(place / "adapter")
    teacher = TeacherConfig(model=folder, dtype="float32", engine="tensor_parallel")
    return [("teacher.model", teacher), ("student.model", StudentConfig(model=folder))]


def test_an_adapter_is_merged_as_peft_merges_it(place):
    tokens = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    with torch.no_grad():
        plain = base(tokens).logits
        expected = peft.PeftModel.from_pretrained(base, place / "adapter")(tokens).logits
    assert (plain - expected).abs().max() > 0.1
    before = (place / "base/model.safetensors").read_bytes()
    for key, section in sections(place):
        files = check_model(section, key, with_weights=True)
        check_complete(section, files)
        assert files.parameters() == (139_584, True)
        assert model_settings(section, key=key).hidden_size == 64
        model = load_pretrained(section, key=key, dtype=torch.float32)
        assert type(model).__name__ == "LlamaForCausalLM"
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    assert (place / "base/model.safetensors").read_bytes() == before


def test_a_base_with_an_adapter_is_another_teacher(place):
    base, adapter = place / "base", place / "adapter"
    merged = model_identity(base, adapter)
    assert merged != model_identity(base)
    change(place, base_model_name_or_path="elsewhere")
    assert model_identity(base, adapter) == merged
    change(place, lora_alpha=16)
    assert model_identity(base, adapter)["config"] != merged["config"]


def test_the_tokenizer_is_the_adapters_own_or_its_bases(place):
    adapter = str(place / "adapter")
    assert len(open_tokenizer(adapter, key="teacher.model")) == 512
    tiny_tokenizer(adapter, vocab_size=300)
    assert len(open_tokenizer(adapter, key="teacher.model")) == 300


def drop_a_tensor(place):
    tensors = load_file(place / "adapter" / WEIGHTS)
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_file(tensors, place / "adapter" / WEIGHTS)


def load(section, key):
    check_model(section, key, with_weights=True)
    load_pretrained(section, key=key, dtype=torch.float32)


REFUSED = {
    "of another kind": (lambda p: change(p, peft_type="IA3"), "of type IA3, expected LORA"),
    "without a base": (lambda p: change(p, base_model_name_or_path=None), "_path is None"),
    "of a base that is gone": (lambda p: shutil.rmtree(p / "base"), "base does not exist"),
    "without weights": (lambda p: (p / "adapter" / WEIGHTS).unlink(), "no adapter_model.safe"),
    "with pickled weights": (
        lambda p: (p / "adapter" / WEIGHTS).rename(p / "adapter/adapter_model.bin"),
        "save the adapter as safetensors",
    ),
    "beside a complete model": (
        lambda p: shutil.copy(p / "base/model.safetensors", p / "adapter"),
        "and a complete model",
    ),
    "that is damaged": (lambda p: (p / "adapter" / SETTINGS).write_text("{"), "cannot be read"),
    "of an adapter": (
        lambda p: change(p, base_model_name_or_path=str(p / "adapter")),
        "adapter of an adapter",
    ),
    "without one of its tensors": (drop_a_tensor, "does not fit its base"),
    "of another size": (lambda p: tiny_llama(p / "base", hidden_size=32), "does not fit its base"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_is_refused(case, place):
    spoil, said = REFUSED[case]
    spoil(place)
    for key, section in sections(place):
        with pytest.raises(ConfigError) as caught:
            load(section, key)
        assert str(caught.value).startswith(f"{key}: ")
        assert said in str(caught.value)


def test_where_peft_is_not_installed_it_is_named(place, monkeypatch):
    monkeypatch.setattr("megadistill.models.adapters.importlib.util.find_spec", lambda name: None)
    for key, section in sections(place):
        with pytest.raises(ConfigError, match=r"pip install megadistill\[peft\]"):
            check_model(section, key, with_weights=True)


def under_zero3(mesh, folder: str):
    """The engine's log-probabilities; its start compares it with the merged model."""
    from megadistill.config import Config
    from megadistill.teacher.engine import load_teacher

    teacher = {"model": folder, "engine": "zero3", "dtype": "float32"}
    data = {"source": "python-stdlib", "seq_len": 16}
    config = Config.model_validate({"data": data, "teacher": teacher})
    found = load_teacher(config, mesh, vocab_size=512)
    tokens = np.arange(16)[None] * 7
    return found.head.log_probs(found.hidden(tokens, [np.zeros(1, np.int64)])).clone()


def test_an_adapter_is_merged_under_zero3(place):
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, place / "adapter")
    with torch.no_grad():
        logits = merged(torch.arange(16)[None] * 7).logits[0]
    expected = torch.log_softmax(logits, -1)
    for found in run_ranks(
        2, "tests.models.test_adapters:under_zero3", folder=str(place / "adapter")
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["models/studnt", "./nowhere", "../x/y", "a/b/c", "models/"])
def test_a_path_that_looks_local_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "models/student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megadistill.models.model_files._hub_config", None)  # a call would fail
    with pytest.raises(ConfigError, match=r"does not exist|no config\.json") as caught:
        check_model(StudentConfig(model=name), "student.model", with_weights=True)
    if name == "models/studnt":
        assert "(is models/student meant?)" in str(caught.value)
