"""Text models of multimodal checkpoints say alone what the whole model says on text.

The truth is plain transformers' whole model. What is not known to agree is refused by name.
"""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from megadistill.config import StudentConfig, TeacherConfig
from megadistill.errors import ConfigError
from megadistill.models.pretrained import load_pretrained
from megadistill.models.text_models import TEXT_MODELS, is_multimodal
from megadistill.preflight.model_checks import check_complete, check_model
from tests.models.architectures import VOCAB
from tests.models.multimodal import MULTIMODAL, PACK, save_multimodal, whole_model
from tests.ranks import run_ranks
from tests.teacher.test_engine import batch, settings
from tests.train.stores import make_config, make_store
from tests.train.test_architectures import COMPARED, STEPS, metrics, plain_losses

VERSION_5 = not transformers.__version__.startswith("4.")
needs_5 = pytest.mark.skipif(not VERSION_5, reason="transformers 4 refuses multimodal models")

QUICK = ["llava", "gemma3", "qwen2_vl", "idefics3"]
LONG = [pytest.mark.long, pytest.mark.models]
WORDS = 90  # ids from here on stand for images


def sample(quick):
    rest = sorted(set(MULTIMODAL) - set(quick))
    return pytest.mark.parametrize(
        "names", [quick, pytest.param(rest, marks=LONG)], ids=["quick", "rest"]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("multimodal")


def saved(folder, name):
    path = folder / name.replace(" ", "_")
    return str(path) if path.exists() else save_multimodal(path, name)


def small_batch():
    tokens, documents = batch()
    return tokens % WORDS, documents


@torch.no_grad()
def whole_log_probs(path, name):
    """Of every document alone, or of each sequence where they are not kept apart."""
    model = whole_model(path)
    tokens, documents = small_batch()
    rows = []
    for row, starts in zip(tokens, documents, strict=True):
        starts = np.zeros(1, np.int64) if name in PACK else starts
        for part in np.split(row, starts[1:]):
            logits = model(input_ids=torch.from_numpy(part)[None]).logits[0].float()
            rows.append(torch.log_softmax(logits, -1))
    return torch.cat(rows)


def teachers(mesh, paths, engine):
    """What the engine says of the batch, by name."""
    from megadistill.teacher.engine import load_teacher

    found = {}
    for name, path in paths.items():
        config = settings(path, pack=PACK.get(name, "isolate"), engine=engine)
        teacher = load_teacher(config, mesh, vocab_size=VOCAB)
        found[name] = teacher.head.log_probs(teacher.hidden(*small_batch())).clone()
    return found


@needs_5
@sample(QUICK)
@pytest.mark.parametrize("engine", ["tensor_parallel", "zero3"])
def test_a_text_model_as_teacher_says_what_the_whole_model_says(folder, names, engine):
    paths = {name: saved(folder, name) for name in names}
    for path in paths.values():
        section = TeacherConfig(model=path)
        check_complete(section, check_model(section, "teacher.model", with_weights=True))
    results = run_ranks(
        2 if engine == "zero3" else 1,
        "tests.models.test_text_models:teachers",
        paths=paths,
        engine=engine,
    )
    wrong = {}
    for name, path in paths.items():
        expected = whole_log_probs(path, name)
        distance = max(float((result[name] - expected).abs().max()) for result in results)
        if not distance < 1e-5:
            wrong[name] = distance
    assert not wrong


def student(folder, name, path, *, run, pack, **train):
    place = folder / f"{name.replace(' ', '_')}-{run}"
    place.mkdir()
    (place / "model").symlink_to(path)
    return make_config(
        place,
        cache={"dir": str(folder / "cache")},
        data={"pack": pack},
        train={"steps": STEPS, "weight_decay": 0.0, **train},
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )


@needs_5
@sample(["gemma3", "qwen2_vl"])
def test_a_text_model_as_student_learns_as_the_whole_model_and_is_exported(folder, names):
    if not (folder / "cache").exists():
        make_store(folder / "cache", seed=1, vocab=VOCAB, words=WORDS)
    paths = {name: saved(folder, name) for name in names}
    # Not every whole model keeps documents apart where positions restart.
    learning = {
        n: student(folder, n, p, run="learns", pack="concat", lr=3e-3) for n, p in paths.items()
    }
    # A step so small changes no float32 weight: the export is the text model as it came.
    standing = {
        n: student(folder, n, p, run="stands", pack=PACK.get(n, "isolate"), lr=1e-30)
        for n, p in paths.items()
    }
    train = "tests.train.test_architectures:train_all"
    assert run_ranks(2, train, configs=learning) == [{}, {}]
    assert run_ranks(2, train, configs=standing) == [{}, {}]
    tokens = torch.arange(3, 40)[None] * 7 % WORDS
    for name, path in paths.items():
        whole = whole_model(path)
        model = AutoModelForCausalLM.from_pretrained(f"{standing[name].train.out_dir}/model")
        assert not is_multimodal(model.config.to_dict()), name
        assert not any("vision" in part or "visual" in part for part in model.state_dict()), name
        with torch.no_grad():
            difference = model(input_ids=tokens).logits - whole(input_ids=tokens).logits
        assert difference.abs().max() < 1e-5, name
        lines = metrics(learning[name])
        assert len(lines) == STEPS, name
        found = [[line["loss"], 0.0, line["grad_norm"]] for line in lines[:COMPARED]]
        expected = plain_losses(learning[name], whole)
        np.testing.assert_allclose(found, expected, rtol=2e-4, err_msg=name)
        assert lines[-1]["loss"] < lines[0]["loss"], name


def test_every_model_type_that_is_known_is_compared():
    assert {name.split()[0] for name in MULTIMODAL} == TEXT_MODELS


def config_only(folder, model_type, **more):
    folder.mkdir(exist_ok=True)
    known = {"model_type": model_type, "text_config": {}, "vision_config": {}, **more}
    (folder / "config.json").write_text(json.dumps(known))
    return str(folder)


def nested_types():
    """All multimodal model types that transformers loads as a language model of some kind."""
    names = set()
    for mapping in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        names |= set(getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}))
    parts = {"text_config", "vision_config", "audio_config", "thinker_config"}
    return sorted(
        n for n in names if parts & set(getattr(CONFIG_MAPPING[n], "sub_configs", None) or {})
    )


def test_every_other_multimodal_model_is_refused_by_name(tmp_path):
    refused = [n for n in nested_types() if n not in TEXT_MODELS or not VERSION_5]
    assert len(refused) > 25
    for model_type in refused:
        path = config_only(tmp_path / "model", model_type)
        sections = {
            "teacher.model": TeacherConfig(model=path),
            "student.model": StudentConfig(model=path, init="random"),
        }
        for key, section in sections.items():
            with pytest.raises(ConfigError) as caught:
                check_model(section, key, with_weights=False)
            said = str(caught.value)
            assert said.startswith(f"{key}: {path} is a multimodal model (model_type {model_type})")
            assert "\n" not in said


@needs_5
def test_special_tokens_and_ties_of_the_whole_model_hold_for_its_text_model(folder):
    path = save_multimodal(
        folder / "ties", "llava", tie_word_embeddings=True, eos_token_id=[5, 9], pad_token_id=7
    )
    with open(f"{path}/config.json") as file:
        stored = json.load(file)
    assert stored["tie_word_embeddings"]
    assert stored["text_config"].get("eos_token_id") != [5, 9]
    model = load_pretrained(TeacherConfig(model=path), key="teacher.model", dtype=torch.float32)
    assert model.config.tie_word_embeddings
    assert (model.config.eos_token_id, model.config.pad_token_id) == ([5, 9], 7)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        difference = model(input_ids=tokens).logits - whole_model(path)(input_ids=tokens).logits
    assert math.isclose(float(difference.abs().max()), 0, abs_tol=1e-5)


@needs_5
def test_a_text_model_whose_tensors_are_missing_is_refused_by_their_names(folder):
    from safetensors.torch import load_file, save_file

    path = save_multimodal(folder / "lacking", "llava")
    file = f"{path}/model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if "layers.1.mlp.up_proj" not in n}
    save_file(tensors, file, {"format": "pt"})
    section = TeacherConfig(model=path)
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        check_complete(section, check_model(section, "teacher.model", with_weights=True))
