"""Bad input, models: each mistake is one line, before any of them is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megadistill.preflight import check_generate, check_train, memory_checks
from megadistill.preflight.plan import make_plan
from tests.models.made import tiny_tokenizer
from tests.preflight.starts import a_cache, config, refused, settings


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./none", "teacher.model: ./none does not exist, expected a model's folder, or a hub id"),
        ("runs/demo/teacher", "teacher.model: runs/demo/teacher does not exist"),
        ("./a.txt", "teacher.model: ./a.txt is a file, expected a model's folder"),
        ("nobody/nothing", "teacher.model: nobody/nothing is no folder here, and cannot be had"),
        ("empty", "teacher.model: empty holds no config.json"),
    ],
)
def test_a_teacher_that_is_not_there(name, said, start_folder):
    Path("empty").mkdir()
    assert refused(check_generate, f"teacher.model={name}", "data.tokenizer=./student").startswith(
        said
    )


def test_a_damaged_config_json(start_folder):
    Path("teacher/config.json").write_text("{")
    line = refused(check_generate, "data.tokenizer=./student")
    assert line.startswith("teacher.model: teacher/config.json: cannot be read: ")


@pytest.mark.parametrize(
    ("kind", "classes"),
    [("bert", ["BertForMaskedLM"]), ("t5", ["T5ForConditionalGeneration"]), ("vit", None)],
)
def test_a_model_that_is_not_a_causal_language_model(kind, classes, start_folder):
    settings("teacher", model_type=kind, architectures=classes)
    line = refused(check_generate, "data.tokenizer=./student")
    assert line.startswith("teacher.model: ./teacher is no causal language model: its config.json")
    settings("student", model_type=kind, architectures=classes)
    a_cache()
    assert refused(check_train, "teacher.model=./none").startswith("student.model: ./student is no")


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "awq", "bitsandbytes"])
def test_a_quantised_model_is_refused_by_its_method(method, start_folder):
    quantisation = {"quant_method": method, "bits": 4}
    settings("teacher", quantization_config=quantisation)
    line = refused(check_generate)
    said = f"./MODEL is quantised (quant_method {method} in its config.json), expected weights in "
    assert line.startswith("teacher.model: " + said.replace("MODEL", "teacher"))
    settings("student", quantization_config=quantisation)
    a_cache()
    line = refused(check_train, "teacher.model=./none")
    assert line.startswith("student.model: " + said.replace("MODEL", "student"))


def test_fp8_weights_whose_config_says_nothing_of_it(start_folder):
    """As transformers 5 saves a model that it has dequantised on loading."""
    import torch
    from safetensors.torch import load_file, save_file

    file = Path("teacher/model.safetensors")
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    weights[name + "_scale_inv"] = torch.ones(1, 1)
    save_file(weights, file, metadata={"format": "pt"})
    line = refused(check_generate)
    assert line.startswith(
        f"teacher.model: ./teacher is quantised ({name} has dtype F8_E4M3), expected "
    )


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(start_folder):
    Path("teacher/own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    settings("teacher", model_type="own", architectures=["OwnModel"], auto_map=own)
    line = refused(check_generate, "data.tokenizer=./student")
    assert "read it, and set teacher.trust_remote_code=true" in line
    check_generate(config("teacher.trust_remote_code=true", "data.tokenizer=./student"), world=1)


def test_weights_that_are_not_safetensors(start_folder):
    Path("teacher/model.safetensors").rename("teacher/pytorch_model.bin")
    line = refused(check_generate)
    assert "teacher.model: ./teacher has its weights as pytorch_model.bin, which can run" in line


def test_a_model_of_which_a_file_was_cut_short(start_folder):
    path = Path("student/model.safetensors")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    a_cache()
    line = refused(check_train)
    assert f"lacks the end of model.safetensors, which has {size - 1:,} of {size:,} bytes" in line


def test_models_that_memory_surely_does_not_hold(start_folder, monkeypatch):
    monkeypatch.setattr(memory_checks, "_available", lambda: 500_000)
    line = refused(check_generate)
    assert "teacher.model: a rank of 1 needs 545.2 KiB for the teacher" in line, line
    assert "teacher.tp" in line
    check_generate(config("teacher.tp=2"), world=2)
    monkeypatch.setattr(memory_checks, "_available", lambda: 700_000)
    a_cache()
    line = refused(check_train)
    assert "student.model: a rank of 1 needs" in line
    assert "offload_optimizer.device=cpu" in line
    check_train(config(), world=16)
    line = refused(
        check_train, "teacher.mode=online", "teacher.engine=zero3", "targets.method=exact", world=4
    )
    assert "for the teacher and" in line
    assert "for the student, without activations, and has 683.6 KiB" in line


def ensemble(*models: str) -> list[str]:
    members = ", ".join(f"{{model: {model}}}" for model in models)
    return ["teacher.mode=online", f"teacher.ensemble=[{members}]"]


def test_another_teacher_is_looked_at_as_the_first_is(start_folder):
    shutil.copytree("teacher", "other")
    check_train(config(*ensemble("other")), world=2)
    assert refused(check_train, *ensemble("other", "./none")).startswith(
        "teacher.ensemble.1.model: ./none does not exist, expected a model's folder, or a hub id"
    )
    settings("other", max_position_embeddings=32)
    assert "32 positions of teacher.ensemble.0.model" in refused(check_train, *ensemble("other"))
    settings("other", max_position_embeddings=256, vocab_size=300)
    line = refused(check_train, *ensemble("other"))
    assert line.startswith("teacher.ensemble.0.model: other has a vocabulary of 300, the tokenizer")
    assert "./teacher has 512 ids" in line
    settings("other", vocab_size=512, auto_map={"AutoModelForCausalLM": "x"}, architectures=["X"])
    line = refused(check_train, *ensemble("other"))
    assert "set teacher.ensemble.0.trust_remote_code=true" in line


def test_another_teacher_of_another_tokenizer(start_folder):
    shutil.copytree("teacher", "other")
    tiny_tokenizer("other", vocab_size=300)
    line = refused(check_train, *ensemble("teacher", "other"))
    assert line.startswith("teacher.ensemble.1.model: the tokenizer of other turns text into other")
    assert "take a teacher of the same tokenizer" in line


def test_all_teachers_are_counted(start_folder, monkeypatch):
    monkeypatch.setattr(memory_checks, "_available", lambda: 1_400_000)
    shutil.copytree("teacher", "other")
    check_train(config("teacher.mode=online"), world=16)
    line = refused(check_train, *ensemble("other"), world=16)
    assert "teacher.model: a rank of 16 needs 1.1 MiB for the 2 teachers and " in line, line
    # Of those in host memory one is awake.
    check_train(config(*ensemble("other"), "teacher.offload=cpu"), world=16)
    one, two, asleep = (
        make_plan(config("teacher.mode=online", *more), world=1)
        for more in ([], ensemble("other"), [*ensemble("other"), "teacher.offload=cpu"])
    )
    assert two.teacher_memory == 2 * one.teacher_memory
    assert asleep.teacher_memory == one.teacher_memory
    said = [line for name, line in two.lines if name == "teacher"]
    assert [line.partition(":")[0] for line in said] == ["./teacher", "other"]


def test_a_model_without_weights_serves_a_random_student_only(start_folder):
    Path("student/model.safetensors").unlink()
    a_cache()
    assert "student.model: ./student holds no weights, expected" in refused(check_train)
    check_train(config("student.init=random"), world=1)


def test_flash_attention_that_is_not_installed(start_folder):
    line = refused(check_generate, "teacher.attention=flash_attention_2")
    assert "teacher.attention: flash_attention_2 needs the package flash-attn" in line


def test_seq_len_beyond_the_models_limit(start_folder):
    settings("student", max_position_embeddings=512)
    assert refused(check_generate, "data.seq_len=257") == (
        "data.seq_len: 257 is beyond the 256 positions of teacher.model (./teacher): set "
        "data.seq_len to 256 or less"
    )
    settings("student", max_position_embeddings=128)
    assert "128 positions of student.model" in refused(check_generate, "data.seq_len=129")


def test_tp_that_does_not_divide_the_ranks(start_folder):
    line = refused(check_generate, "teacher.tp=2", world=3)
    assert line.startswith("teacher.tp: 2 does not divide the 3 ranks of this run")


def test_tp_that_does_not_divide_the_heads(start_folder):
    assert refused(check_generate, "teacher.tp=3", world=3) == (
        "teacher.tp: 3 does not divide the 4 attention heads of ./teacher: set it to one of "
        "1, 2, 4, or use teacher.engine=zero3 with teacher.tp=1"
    )
    assert "does not divide the 2 key-value heads of ./teacher: set it to one of 1, 2, or" in (
        refused(check_generate, "teacher.tp=4", world=4)
    )
