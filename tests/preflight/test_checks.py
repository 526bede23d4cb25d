"""Bad input: each mistake is one line, before any model is loaded, and nothing is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megadistill.config import Config, load_config
from megadistill.errors import ConfigError
from megadistill.preflight import check_generate, check_train
from megadistill.preflight.folder_checks import check_room
from megadistill.preflight.plan import make_plan
from megadistill.storage.disk import check_disk, free_bytes
from tests.models.made import tiny_llama, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("teacher", "student"):
        tiny_model(folder / name)
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch) -> Path:
    for name in ("teacher", "student"):
        shutil.copytree(models / name, tmp_path / name)
    (tmp_path / "a.txt").write_text("Some text. " * 100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def config(*overrides: str) -> Config:
    Path("c.yaml").write_text(
        """
data: {files: [a.txt], dir: tokens, seq_len: 64}
teacher: {model: ./teacher, dtype: float32}
cache: {dir: cache, min_free: 0}
student: {model: ./student}
train: {steps: 10, out_dir: run}
"""
    )
    return load_config("c.yaml", list(overrides))


def refused(check, *overrides: str, world: int = 1) -> str:
    """What is said: one line, and nothing is written."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(ConfigError) as caught:
        check(config(*overrides), world=world)
    assert sorted(p for p in Path().rglob("*") if p.name != "c.yaml") == [
        p for p in before if p.name != "c.yaml"
    ]
    assert "\n" not in str(caught.value), str(caught.value)
    return str(caught.value)


def settings(model: str, **changed) -> None:
    path = Path(model) / "config.json"
    kept = {k: v for k, v in (json.loads(path.read_text()) | changed).items() if v is not None}
    path.write_text(json.dumps(kept))


def a_cache() -> None:
    Path("cache").mkdir()
    Path("cache/cache.json").write_text("{}")


def test_what_is_sound_passes(place):
    check_generate(config("data.block_size=8"), world=2)
    a_cache()
    check_train(config(), world=2)
    assert sorted(p.name for p in place.iterdir()) == [
        "a.txt",
        "c.yaml",
        "cache",
        "student",
        "teacher",
    ]


def test_a_missing_corpus(place):
    assert refused(check_generate, "data.files=[none/*.txt]").startswith(
        "data.files: no file matches 'none/*.txt'"
    )


def test_generating_needs_a_corpus_and_a_teacher(place):
    with pytest.raises(ConfigError) as caught:
        check_generate(config("data.files=null", "teacher.model=null"), world=1)
    assert str(caught.value).splitlines() == [
        "data: no corpus: set one of data.source=python-stdlib, data.files=[...] (local files) or "
        "data.name (a dataset on the hub)",
        "teacher.model: missing, expected a folder or a hub id: set teacher.model",
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.divergence=jsd"], "loss.divergence: jsd cannot be computed from varopt targets"),
        (["loss.temperature=2"], "loss.temperature: 2.0 differs from the targets' temperature 1.0"),
        (["targets.method=exact"], "targets.method: exact compares whole distributions, which no"),
    ],
)
def test_a_cache_that_the_students_loss_cannot_use_is_not_generated(overrides, said, place):
    assert refused(check_generate, *overrides).startswith(said)


def test_targets_at_another_temperature_are_generated_for_a_loss_that_follows(place):
    check_generate(config("data.block_size=8", "targets.temperature=2"), world=1)


def test_an_empty_corpus(place):
    Path("a.txt").write_text("")
    assert "a.txt: the corpus is empty" in refused(check_generate)


def test_a_corpus_of_unknown_kind(place):
    Path("a.exe").write_text("x")
    assert "a.exe: cannot tell what it holds" in refused(check_generate, "data.files=[a.exe]")


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
def test_a_teacher_that_is_not_there(name, said, place):
    Path("empty").mkdir()
    assert refused(check_generate, f"teacher.model={name}", "data.tokenizer=./student").startswith(
        said
    )


def test_a_damaged_config_json(place):
    Path("teacher/config.json").write_text("{")
    line = refused(check_generate, "data.tokenizer=./student")
    assert line.startswith("teacher.model: teacher/config.json: cannot be read: ")


@pytest.mark.parametrize(
    ("kind", "classes"),
    [("bert", ["BertForMaskedLM"]), ("t5", ["T5ForConditionalGeneration"]), ("vit", None)],
)
def test_a_model_that_is_not_a_causal_language_model(kind, classes, place):
    settings("teacher", model_type=kind, architectures=classes)
    line = refused(check_generate, "data.tokenizer=./student")
    assert line.startswith("teacher.model: ./teacher is no causal language model: its config.json")
    settings("student", model_type=kind, architectures=classes)
    a_cache()
    assert refused(check_train, "teacher.model=./none").startswith("student.model: ./student is no")


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "awq", "bitsandbytes"])
def test_a_quantised_model_is_refused_by_its_method(method, place):
    quantisation = {"quant_method": method, "bits": 4}
    settings("teacher", quantization_config=quantisation)
    line = refused(check_generate)
    said = f"./MODEL is quantised (quant_method {method} in its config.json), expected weights in "
    assert line.startswith("teacher.model: " + said.replace("MODEL", "teacher"))
    settings("student", quantization_config=quantisation)
    a_cache()
    line = refused(check_train, "teacher.model=./none")
    assert line.startswith("student.model: " + said.replace("MODEL", "student"))


def test_fp8_weights_whose_config_says_nothing_of_it(place):
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


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(place):
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


def test_weights_that_are_not_safetensors(place):
    Path("teacher/model.safetensors").rename("teacher/pytorch_model.bin")
    line = refused(check_generate)
    assert "teacher.model: ./teacher has its weights as pytorch_model.bin, which can run" in line


def test_a_model_of_which_a_file_was_cut_short(place):
    path = Path("student/model.safetensors")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    a_cache()
    line = refused(check_train)
    assert f"lacks the end of model.safetensors, which has {size - 1:,} of {size:,} bytes" in line


def test_models_that_memory_surely_does_not_hold(place, monkeypatch):
    from megadistill.preflight import memory_checks

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


def test_another_teacher_is_looked_at_as_the_first_is(place):
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


def test_another_teacher_of_another_tokenizer(place):
    shutil.copytree("teacher", "other")
    tiny_tokenizer("other", vocab_size=300)
    line = refused(check_train, *ensemble("teacher", "other"))
    assert line.startswith("teacher.ensemble.1.model: the tokenizer of other turns text into other")
    assert "take a teacher of the same tokenizer" in line


def test_all_teachers_are_counted(place, monkeypatch):
    from megadistill.preflight import memory_checks
    from megadistill.preflight.plan import make_plan

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


def test_a_model_without_weights_serves_a_random_student_only(place):
    Path("student/model.safetensors").unlink()
    a_cache()
    assert "student.model: ./student holds no weights, expected" in refused(check_train)
    check_train(config("student.init=random"), world=1)


def test_flash_attention_that_is_not_installed(place):
    line = refused(check_generate, "teacher.attention=flash_attention_2")
    assert "teacher.attention: flash_attention_2 needs the package flash-attn" in line


@pytest.mark.parametrize("check", [check_generate, check_train])
def test_a_vocabulary_mismatch_between_teacher_and_student(check, place):
    settings("student", vocab_size=500)
    if check is check_train:
        a_cache()
    line = refused(check)
    assert line.startswith(
        "student.model: ./student has a vocabulary of 500, the tokenizer ./teacher has 512 ids"
    )


@pytest.mark.parametrize("check", [check_generate, check_train])
@pytest.mark.parametrize(("padded", "rows"), [("teacher", 640), ("student", 600)])
def test_a_model_that_is_padded_further_than_the_other_is_fine(check, padded, rows, place):
    tiny_llama(padded, vocab_size=rows)
    if check is check_train:
        a_cache()
    check(config(), world=1)


@pytest.mark.parametrize("check", [check_generate, check_train])
def test_tokenizers_that_give_other_ids(check, place):
    path = Path("student/tokenizer.json")
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[300], list(vocabulary)[301]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(tokenizer))
    if check is check_train:
        a_cache()
    line = refused(check)
    assert "student.model: the tokenizer of ./student turns text into other ids than" in line
    assert f"({a!r} is 300 in the one and 301 in the other)" in line


def test_a_student_that_is_not_there_yet_does_not_hold_up_generating(place, caplog):
    shutil.rmtree("student")
    check_generate(config(), world=1)
    assert "the student is not compared with the teacher yet" in caplog.text


def test_a_teacher_that_is_gone_does_not_hold_up_training(place):
    shutil.rmtree("teacher")
    a_cache()
    check_train(config(), world=1)


def test_a_tokenizer_that_does_not_match_the_model(place):
    tiny_tokenizer("large", vocab_size=700)
    assert refused(check_generate, "data.tokenizer=./large", "student=null").startswith(
        "data.tokenizer: the tokenizer ./large has ids up to 699, and the teacher ./teacher a "
        "vocabulary of 512"
    )


def test_an_added_token_without_a_row_is_named_with_its_cure(place):
    tokenizer = AutoTokenizer.from_pretrained("teacher")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained("teacher")
    said = refused(check_generate, "student=null")
    assert said.startswith("teacher.model: the tokenizer ./teacher has ids up to 512, and")
    assert "the added token '[PAD]' (id 512) has no row in the model: remove" in said
    assert "data.tokenizer" not in said


def test_a_sentencepiece_model_alone_is_named_with_its_cure(place):
    (place / "pieces").mkdir()
    (place / "pieces/tokenizer.model").write_bytes(
        b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
    )
    Path("pieces/tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    Path("pieces/config.json").write_text('{"model_type": "llama"}')
    said = refused(check_generate, "data.tokenizer=./pieces", "student=null")
    assert said.startswith(
        "data.tokenizer: ./pieces: found tokenizer.model and no tokenizer.json, expected a fast "
        "tokenizer: convert it once (pip install sentencepiece"
    )


def test_a_tokenizer_that_is_not_there(place):
    line = refused(check_generate, "data.tokenizer=./none")
    assert line.startswith("data.tokenizer: ./none does not exist, expected a folder with")


def test_a_model_without_a_tokenizer(place):
    for file in Path("teacher").glob("tokenizer*"):
        file.unlink()
    assert refused(check_generate).startswith(
        "teacher.model: ./teacher: no tokenizer can be loaded"
    )


def test_seq_len_beyond_the_models_limit(place):
    settings("student", max_position_embeddings=512)
    assert refused(check_generate, "data.seq_len=257") == (
        "data.seq_len: 257 is beyond the 256 positions of teacher.model (./teacher): set "
        "data.seq_len to 256 or less"
    )
    settings("student", max_position_embeddings=128)
    assert "128 positions of student.model" in refused(check_generate, "data.seq_len=129")


def test_tp_that_does_not_divide_the_ranks(place):
    line = refused(check_generate, "teacher.tp=2", world=3)
    assert line.startswith("teacher.tp: 2 does not divide the 3 ranks of this run")


def test_tp_that_does_not_divide_the_heads(place):
    assert refused(check_generate, "teacher.tp=3", world=3) == (
        "teacher.tp: 3 does not divide the 4 attention heads of ./teacher: set it to one of "
        "1, 2, 4, or use teacher.engine=zero3 with teacher.tp=1"
    )
    assert "does not divide the 2 key-value heads of ./teacher: set it to one of 1, 2, or" in (
        refused(check_generate, "teacher.tp=4", world=4)
    )


@pytest.mark.parametrize(
    ("check", "key", "folder"),
    [
        (check_generate, "data.dir", "tokens"),
        (check_generate, "cache.dir", "cache"),
        (check_train, "train.out_dir", "run"),
    ],
)
def test_an_output_folder_that_holds_something_else(check, key, folder, place):
    if check is check_train:
        a_cache()
    Path(folder).mkdir()
    (Path(folder) / "thesis.tex").write_text("years of work")
    assert refused(check).startswith(f"{key}: {folder} holds something else (thesis.tex)")
    (Path(folder) / "thesis.tex").unlink()
    check(config(), world=1)
    Path(folder).rmdir()
    Path(folder).write_text("a file")
    assert refused(check).startswith(f"{key}: {folder} is a file, expected a folder")


def test_a_token_store_where_the_cache_should_go(place):
    Path("cache").mkdir()
    Path("cache/tokens.json").write_text("{}")
    assert refused(check_generate).startswith("cache.dir: cache holds a store of kind tokens")
    assert refused(check_train).startswith("cache.dir: cache holds no cache.json")


def test_training_without_a_cache(place):
    assert refused(check_train).startswith("cache.dir: cache does not exist, expected a cache")


def test_the_text_of_a_token_store_is_enough_where_nothing_is_distilled(place):
    Path("tokens").mkdir()
    Path("tokens/tokens.json").write_text("{}")
    check_train(
        config("cache.dir=tokens", "data.dir=other", "loss.kd_weight=0", "loss.ce_weight=1"),
        world=1,
    )
    said = refused(check_train, "cache.dir=tokens", "data.dir=other")
    assert said.startswith("cache.dir: tokens holds no cache.json, expected a cache")


def test_training_with_a_held_out_cache_that_is_not_there(place):
    a_cache()
    assert refused(check_train, "eval.cache=heldout").startswith(
        "eval.cache: heldout does not exist, expected a cache: make it with launch/generate.py"
    )


def test_a_cache_of_another_teacher_that_is_not_there(place):
    a_cache()
    said = refused(check_train, "cache.ensemble=['hf://owner/set', {dir: other, weight: 2}]")
    assert said.startswith(
        "cache.ensemble.1.dir: other does not exist, expected a cache: make it with launch/gener"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cache.dir=[a, b]", "cache.dir: a list of 2 caches is to train from, and generating"),
        ("cache.dir=s3://bucket/cache", "cache.dir: a URL is to train from, and generating"),
        ("data.dir=s3://bucket/tokens", "data.dir: a URL cannot be written in place: set it to"),
    ],
)
def test_generating_into_anything_but_a_folder(override, said, place):
    assert refused(check_generate, override).startswith(said)


def test_training_from_a_list_looks_at_each_and_leaves_urls_to_the_start(place):
    a_cache()
    check_train(config("cache.dir=[cache, {dir: s3://bucket/cache, weight: 2}]"), world=1)
    said = refused(check_train, "cache.dir=[cache, s3://bucket/cache, elsewhere]")
    assert said.startswith("cache.dir: elsewhere does not exist, expected a cache")
    said = refused(check_train, "train.out_dir=s3://bucket/run")
    assert said.startswith("train.out_dir: a URL cannot be trained into")


def test_training_with_a_tracker_whose_library_is_not_installed(place, monkeypatch):
    a_cache()
    monkeypatch.setitem(sys.modules, "wandb", None)  # for Python: there is no such package
    said = refused(check_train, "train.trackers=[wandb]")
    assert said.startswith("train.trackers: wandb needs the package wandb, which is not installed")


def test_training_without_a_student(place):
    assert refused(check_train, "student=null").startswith("student: there is nothing to train")


def test_too_little_disk_for_the_estimate(place):
    line = refused(check_generate, f"cache.min_free={free_bytes('.') / 2**30 + 1}")
    assert line.startswith("cache.dir: cache needs about ")
    assert "and its disk has" in line
    with pytest.raises(ConfigError, match=r"x: none/yet needs about 909\.5 TiB"):
        check_disk("none/yet", 10**15, key="x")
    check_disk("none/yet", 10)


def test_a_disk_that_is_too_small_for_a_run_is_said_with_what_a_run_can_do(place):
    config = load_config("demo.yaml", [f"cache.min_free={free_bytes('.') / 2**30 + 1}"])
    plan = make_plan(config, world=1)
    plan = dataclasses.replace(plan, run_bytes_to_come=10**6)
    with pytest.raises(ConfigError, match=r"^train\.out_dir: .* or keep fewer checkpoints"):
        check_room(config, plan, training=True)


def test_all_mistakes_are_reported_at_once(place):
    settings("teacher", max_position_embeddings=32)
    Path("tokens").write_text("a file")
    with pytest.raises(ConfigError) as caught:
        check_generate(config("data.files=[none.txt]", "teacher.tp=3"), world=2)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "teacher.tp",
        "data.files",
        "data.dir",
        "data.seq_len",
        "teacher.tp",
    ]
