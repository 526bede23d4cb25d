"""Models that carry a state say of each document what they say of it alone: teacher and student."""

import json
import logging
from importlib.metadata import version

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from megadistill.cache.reader import open_cache
from megadistill.config import Config, TeacherConfig
from megadistill.errors import ConfigError
from megadistill.models.attention import check_isolation
from megadistill.models.documents_apart import (
    DocumentsApart,
    carries_state,
    grouped_by_length,
    log_apart,
)
from megadistill.models.pretrained import log_attention
from megadistill.student.features import feature_plan
from tests.cache.building import hashes
from tests.models.architectures import ARCHITECTURES, VOCAB, save_architecture
from tests.models.documents_alone import alone, plain, plain_steps, saved
from tests.models.hybrids import HYBRIDS
from tests.models.made import tiny_tokenizer
from tests.ranks import run_ranks
from tests.teacher.test_engine import settings
from tests.train.stores import make_config, make_store

HERE = "tests.models.test_documents_apart"
B, T = 3, 24
QUICK = ["falcon_h1", "lfm2", "qwen3_next"]
# transformers 4 has experts as lists of modules, which a student cannot have here.
STUDENT = "falcon_h1" if version("transformers").startswith("4.") else "qwen3_next"
# Their weights are initialised by shapes that ZeRO-3 has taken apart.
UNPARTITIONED = ["rwkv", "xlstm"]
STUDENTS = sorted(set(HYBRIDS) - {"qwen4_exp_text"})
LONG = [pytest.mark.long, pytest.mark.models]


def unequal(rank: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rank 0: whole sequences. Rank 1: documents of one token, and some of several lengths."""
    tokens = np.random.default_rng(rank).integers(0, VOCAB, (B, T))
    if rank == 0:
        return tokens, [np.zeros(1, np.int64)] * B
    return tokens, [np.arange(T), np.arange(T), np.array([0, 1, 3, 4, 11, 19, 21])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hybrids")


# ---- grouping


def test_groups_hold_every_document_once_and_are_no_larger_than_the_micro_batch():
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(1, 100, generator.integers(1, 60))
        groups = grouped_by_length(lengths, limit=int(lengths.sum()))
        assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
        assert all(len(g) * lengths[g].max() <= lengths.sum() for g in groups)
        flat = lengths[np.concatenate(groups)]
        assert (np.diff(flat) >= 0).all()


def test_positions_come_back_in_the_order_of_the_sequences():
    tokens, documents = unequal(1)
    apart = DocumentsApart.of(tokens, documents)
    laid_out = torch.cat([ids.flatten() for ids in apart.groups])
    assert (laid_out[apart.order_N].numpy() == tokens.reshape(-1)).all()
    assert [tuple(ids.shape) for ids in apart.groups] == [(50, 1), (3, 3), (2, 8)]


def test_documents_of_one_token_are_followed_by_another_where_none_is_longer():
    """So that what carries a state on has a gradient, if a zero, on every rank."""
    apart = DocumentsApart.of(np.arange(6).reshape(2, 3), [np.arange(3)] * 2)
    assert [ids.tolist() for ids in apart.groups] == [[[i, 0] for i in range(6)]]
    assert apart.order_N.tolist() == [0, 2, 4, 6, 8, 10]


def test_a_state_is_known_from_config_json():
    assert carries_state({"layer_types": ["full_attention", "linear_attention"]})
    assert carries_state(
        {"text_config": {"layer_types": ["linear_attention"]}, "layer_types": None}
    )
    assert carries_state({"model_type": "jamba", "mamba_d_state": 16}) == "mamba_d_state"
    # Granite 4 comes with attention alone, too.
    dense = {"layer_types": ["attention", "attention"], "mamba_d_state": 256}
    assert carries_state(dense) is None


@pytest.mark.parametrize("name", [*HYBRIDS, *ARCHITECTURES])
def test_a_state_is_known_of_every_architecture_that_has_one(folder, name):
    config = AutoConfig.for_model(name, **(HYBRIDS | ARCHITECTURES)[name].settings)
    assert (carries_state(vars(config)) is not None) == (name in HYBRIDS)


# ---- teacher


def log_probs(mesh, models, engine):
    """By name the log-probabilities of this rank's documents, or what the start ends with."""
    from megadistill.errors import TeacherError
    from megadistill.teacher import engine as teacher_engine
    from tests.teacher.test_architectures import all_partitioned

    found = {}
    with all_partitioned(teacher_engine):
        for name, model in models.items():
            config = settings(model, tp=mesh.tp, engine=engine)
            try:
                teacher = teacher_engine.load_teacher(config, mesh, vocab_size=VOCAB)
                hidden_NH = teacher.hidden(*unequal(mesh.rank // mesh.tp))
                found[name] = teacher.head.log_probs(hidden_NH).clone()
            except TeacherError as error:
                found[name] = str(error)
    return found


def farthest(folder, results, name, tp):
    """The largest distance from plain transformers on each rank's documents."""
    model = plain(saved(folder, name))
    distances = []
    for group in range(len(results) // tp):
        with torch.no_grad():
            expected = torch.log_softmax(alone(model, *unequal(group)), 1)
        parts = [result[name] for result in results[group * tp : (group + 1) * tp]]
        found = parts[0] if isinstance(parts[0], str) else torch.cat(parts, 1)
        if isinstance(found, str):
            return found
        distances.append(float((found - expected).abs().max()))
    return max(distances)


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(sorted(HYBRIDS), marks=LONG)], ids=["some", "all"]
)
@pytest.mark.parametrize(
    ("ranks", "engine"), [(1, "tensor_parallel"), (2, "zero3")], ids=["tp=1", "zero3"]
)
def test_a_teacher_says_of_each_document_what_plain_transformers_says(folder, names, ranks, engine):
    models = {name: saved(folder, name) for name in names}
    results = run_ranks(ranks, f"{HERE}:log_probs", models=models, engine=engine)
    names = [name for name in names if engine != "zero3" or name not in UNPARTITIONED]
    wrong = {name: farthest(folder, results, name, 1) for name in names}
    assert not {name: d for name, d in wrong.items() if isinstance(d, str) or not d < 1e-5}


@pytest.mark.skipif(version("transformers").startswith("4."), reason="three of them fail there")
@pytest.mark.parametrize("name", HYBRIDS)
def test_documents_that_share_a_state_would_be_seen(folder, name):
    tokens, documents = unequal(1)
    model = plain(saved(folder, name))
    with torch.no_grad():
        expected = torch.log_softmax(alone(model, tokens, documents), 1)
        joined = torch.log_softmax(alone(model, tokens, [np.zeros(1, np.int64)] * B), 1)
    assert float((joined - expected).abs().max()) > 1e-3


@pytest.mark.skipif(version("transformers").startswith("4."), reason="they fail otherwise there")
def test_a_teacher_that_zero3_cannot_partition_is_refused_by_name(folder):
    models = {name: saved(folder, name) for name in UNPARTITIONED}
    results = run_ranks(2, f"{HERE}:log_probs", models=models, engine="zero3")
    for result in results:
        for name, model in models.items():
            assert result[name] == (
                f"teacher.model: {model} (model_type {name}) cannot be partitioned by ZeRO-3 "
                "(IndexError: tuple index out of range): set teacher.engine=tensor_parallel"
            )


@pytest.mark.long
@pytest.mark.models
def test_tp_2_is_right_or_refused_by_name(folder):
    # The programs refuse teacher.tp=2 for its single key-value head before they load it.
    models = {name: saved(folder, name) for name in HYBRIDS if name != "recurrent_gemma"}
    results = run_ranks(2, f"{HERE}:log_probs", tp=2, models=models, engine="tensor_parallel")
    for name in models:
        said = farthest(folder, results, name, 2)
        if isinstance(said, str):
            assert said.startswith("teacher.tp: 2: "), said
            assert f"({name})" in said, said
            assert "\n" not in said
        else:
            assert said < 1e-5, name


def test_a_cache_has_the_same_bytes_at_every_number_of_ranks(folder):
    config = cache_config(folder, "tensor_parallel", "1")
    run_ranks(1, BUILD, config=config)
    found = hashes(folder / "cache-1")
    assert len([name for name in found if name.endswith(".mds")]) > 4
    recipe = open_cache(folder / "cache-1").recipe
    assert (config.teacher.attention, recipe["attention"]) == ("sdpa", "eager")
    run_ranks(2, BUILD, config=cache_config(folder, "tensor_parallel", "2"))
    assert hashes(folder / "cache-2") == found
    # Blocks that do not divide by the ranks: a rank runs padding in the last round.
    run_ranks(2, BUILD, config=cache_config(folder, "zero3", "zero3"))
    for name, block in found.items():
        if name.endswith(".mds"):
            assert hashes(folder / "cache-zero3")[name] == block, name


BUILD = "tests.cache.building:build"


def cache_config(folder, engine, out):
    """Of short texts, and Mamba, which has no sdpa, as the teacher."""
    path = folder / "mamba512"
    if not path.exists():
        save_architecture(path, "mamba", vocab_size=512)
        tiny_tokenizer(path)
        texts = [f"number {i} " + "and so on " * (i % 13) for i in range(90)]
        (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return Config(
        data={
            "files": [str(folder / "text.jsonl")],
            "dir": str(folder / "tokens"),
            "seq_len": 48,
            "block_size": 5,
            "workers": 1,
        },
        teacher={"model": str(path), "dtype": "float32", "micro_batch": 3, "engine": engine},
        targets={"tau": 0.1},
        cache={"dir": str(folder / f"cache-{out}")},
    )


def test_how_a_model_runs_is_said_once(folder, caplog):
    path = saved(folder, "mamba")
    settings = AutoConfig.from_pretrained(path)
    with caplog.at_level(logging.INFO):
        log_attention(TeacherConfig(model=path), settings, key="teacher.model")
        log_apart(plain(path), "isolate", key="teacher.model")
        log_apart(plain(path), "concat", key="teacher.model")
    assert [record.getMessage() for record in caplog.records] == [
        "teacher.model: transformers has no sdpa attention for model_type mamba: it runs with "
        "eager attention",
        "teacher.model: model_type mamba carries a state from token to token (state_size): the "
        "documents of a sequence run apart (data.pack: isolate)",
    ]


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_layers_of_documents_that_run_apart_are_not_aligned(folder, which):
    models = {"teacher": saved(folder, "llama"), "student": saved(folder, "llama")}
    config = aligning(models)
    assert feature_plan(config, AutoConfig.from_pretrained(models["student"])) is not None
    models[which] = saved(folder, "lfm2")
    config = aligning(models)
    with pytest.raises(ConfigError) as refused:
        feature_plan(config, AutoConfig.from_pretrained(models["student"]))
    assert str(refused.value) == (
        f"features: {which}.model (lfm2) carries a state from token to token (layer_types: conv): "
        "under data.pack=isolate its documents run apart, and layers are not aligned: set "
        "loss.hidden_weight=0, or data.pack=concat"
    )
    config = aligning(models, pack="concat")
    assert feature_plan(config, AutoConfig.from_pretrained(models["student"])) is not None


def aligning(models, pack="isolate"):
    return Config(
        data={"source": "python-stdlib", "pack": pack},
        teacher={"model": models["teacher"], "mode": "online"},
        student={"model": models["student"]},
        loss={"hidden_weight": 0.1},
        features={"hidden_layers": [(1, 1)]},
        train={"steps": 1},
    )


# ---- student


def unequal_store(path):
    """A cache whose sequences are one document, documents of one token, or two documents."""
    make_store(path, seed=1, vocab=VOCAB, documents=[[0], range(16), None])


def student_config(folder, name, **train):
    model = saved(folder, name, output_router_logits=True, router_aux_loss_coef=0.5)
    if not (folder / "cache").exists():
        unequal_store(folder / "cache")
    return make_config(
        folder / name,
        cache={"dir": str(folder / "cache")},
        student={"model": model},
        train={
            "lr": 1e-3,
            "global_batch": 8,
            "micro_batch": 2,
            "out_dir": str(folder / name / "-".join(map(str, train.values()))),
            **train,
        },
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )


@pytest.mark.skipif("qwen4_exp_text" not in HYBRIDS, reason="not in this transformers")
def test_a_student_that_calls_a_module_once_a_token_is_refused(folder):
    model = plain(saved(folder, "qwen4_exp_text")).model
    with pytest.raises(ConfigError) as refused:
        check_isolation(model, name="student.model", seq_len=24, vocab_size=VOCAB)
    assert str(refused.value) == (
        "data.pack: isolate, but student.model (qwen4_exp_text) carries a state from token to "
        "token and calls layers.1.self_attn.indexer.k_layernorm more often the longer a document "
        "is: ZeRO-3 ranks with other documents would wait for each other: set data.pack=concat"
    )


@pytest.mark.parametrize(
    ("names", "steps", "again"),
    [
        ([STUDENT], 4, True),
        pytest.param(STUDENTS, 10, True, marks=LONG),
        pytest.param(STUDENTS, 10, False, marks=LONG),
    ],
    ids=["some", "all", "all without activation checkpointing"],
)
def test_a_student_learns_of_each_document_what_a_plain_loop_learns_of_it_alone(
    folder, names, steps, again
):
    configs = {
        name: student_config(folder, name, steps=steps, activation_checkpointing=again)
        for name in names
    }
    assert run_ranks(2, "tests.train.test_architectures:train_all", configs=configs) == [{}, {}]
    for name, config in configs.items():
        with open(f"{config.train.out_dir}/metrics.jsonl") as file:
            lines = [json.loads(line) for line in file]
        found = [[line["loss"], line.get("router_loss", 0.0), line["grad_norm"]] for line in lines]
        assert len(found) == steps, name
        expected = np.array(plain_steps(config))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
