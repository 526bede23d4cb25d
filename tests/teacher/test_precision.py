"""Tensors that plain transformers keeps in float32 are the same, to the bit, under every engine."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import AutoModelForCausalLM

from megadistill.config import Config
from megadistill.models.pretrained import backbone
from tests.models.architectures import ARCHITECTURES, VOCAB, save_random
from tests.ranks import run_ranks

log = logging.getLogger(__name__)

_LLAMA = {**ARCHITECTURES["llama"].settings, "max_position_embeddings": 4096}
_SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
_ROPE = "rope_scaling" if version("transformers").startswith("4.") else "rope_parameters"
_ERNIE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 1,
    "max_position_embeddings": 64,
}

# What each keeps in float32: rotary frequencies, DeepSeek-V3's correction bias and Ernie's routers.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "llama3": ("llama", {**_LLAMA, _ROPE: _SCALED}),
    "yarn": ("llama", {**_LLAMA, _ROPE: _YARN}),
    "two bases": ("gemma3_text", ARCHITECTURES["gemma3_text"].settings),
    "deepseek_v3": ("deepseek_v3", ARCHITECTURES["deepseek_v3"].settings),
    "ernie4_5_moe": ("ernie4_5_moe", _ERNIE),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("precision")
    for name, (model_type, settings) in MODELS.items():
        save_random(folder / name, model_type, settings, seed=0)
    return str(folder)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, gathered where they are partitioned, and buffers."""
    import deepspeed

    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().cpu().clone()
    return found | {name: buffer.cpu().clone() for name, buffer in model.named_buffers()}


def load(mesh, model: str, *, seq_len: int, **teacher):
    from megadistill.teacher.engine import load_teacher

    teacher = {"model": model, "tp": mesh.tp, **teacher}
    data = {"source": "python-stdlib", "seq_len": seq_len, "pack": "concat"}
    config = Config.model_validate({"data": data, "teacher": teacher})
    return load_teacher(config, mesh, vocab_size=VOCAB)


def engine_tensors(mesh, folder: str, engine: str, dtype: str, names: list[str]) -> dict[str, dict]:
    return {
        name: tensors(
            load(mesh, f"{folder}/{name}", seq_len=24, engine=engine, dtype=dtype).engine.module
        )
        for name in names
    }


ENGINES = {
    "whole": (1, 1, "tensor_parallel"),
    "tp=2": (2, 2, "tensor_parallel"),
    "zero3": (2, 1, "zero3"),
}


@pytest.mark.long
@pytest.mark.models
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_dtypes_and_values_are_those_of_plain_transformers(folder, engine, dtype):
    compare_tensors(folder, engine, dtype, list(MODELS))


def test_float32_tensors_stay_so_where_zero3_partitions_in_bfloat16(folder):
    compare_tensors(folder, "zero3", "bfloat16", ["deepseek_v3", "ernie4_5_moe"])


def loaded_in_float16(mesh, model: str, engine: str, supported: list[torch.dtype]) -> str:
    """The refusal of a teacher on a machine with these number formats."""
    from megadistill.errors import ConfigError

    accelerator = get_accelerator()
    accelerator.supported_dtypes = lambda: supported
    try:
        load(mesh, model, seq_len=24, engine=engine, dtype="float16")
    except ConfigError as error:
        return str(error)
    finally:
        del accelerator.supported_dtypes
    return ""


@pytest.mark.parametrize(("ranks", "engine"), [(1, "tensor_parallel"), (2, "zero3")])
def test_a_number_format_that_the_machine_lacks_is_refused(folder, ranks, engine):
    for said in run_ranks(
        ranks,
        "tests.teacher.test_precision:loaded_in_float16",
        model=f"{folder}/llama",
        engine=engine,
        supported=[torch.float32, torch.bfloat16],
    ):
        assert said == (
            "teacher.dtype: float16, and DeepSpeed does not run it on this machine's cpu, expected "
            "float32 or bfloat16"
        )


def compare_tensors(folder: str, engine: str, dtype: str, names: list[str]) -> None:
    if getattr(torch, dtype) not in get_accelerator().supported_dtypes():
        pytest.skip(f"DeepSpeed has no {dtype} on this machine")
    ranks, tp, engine = ENGINES[engine]
    results = run_ranks(
        ranks,
        "tests.teacher.test_precision:engine_tensors",
        tp=tp,
        folder=folder,
        engine=engine,
        dtype=dtype,
        names=names,
    )
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(
            f"{folder}/{name}", dtype=getattr(torch, dtype)
        )
        plain = tensors(backbone(model))
        assert any(value.dtype == torch.float32 for value in plain.values())
        for found in (result[name] for result in results):
            assert set(found) == set(plain), name
            wrong = [n for n in plain if found[n].dtype != plain[n].dtype]
            assert not wrong, (name, wrong)
        for key, expected in plain.items():
            assert same(expected, [result[name][key] for result in results]), (name, key)


def same(expected: torch.Tensor, found: list[torch.Tensor]) -> bool:
    """Whether each rank has the whole tensor, or all have slices of it along one dimension.

    Experts' gate and up projections lie in one tensor, and each rank has slices of both.
    """
    if found[0].shape == expected.shape:
        return all(torch.equal(part, expected) for part in found)
    differing = [i for i, size in enumerate(expected.shape) if found[0].shape[i] != size]
    if len(differing) != 1:
        return False
    halves = [part.chunk(2, differing[0]) for part in found]
    each = [half[0] for half in halves] + [half[1] for half in halves]
    return any(torch.equal(torch.cat(parts, differing[0]), expected) for parts in (found, each))


def random_tokens(sequences: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (sequences, length))


def engine_log_probs(mesh, model: str, engine: str, sequences: int, length: int) -> torch.Tensor:
    """[N, V or this rank's slice] in bfloat16, a sequence at a time."""
    teacher = load(mesh, model, seq_len=length, engine=engine, dtype="bfloat16")
    rows = []
    for tokens_T in random_tokens(sequences, length):
        hidden_TH = teacher.hidden(tokens_T[None], [np.zeros(1, np.int64)])
        rows += [teacher.head.log_probs(part).clone() for part in hidden_TH.split(512)]
    return torch.cat(rows)


def plain_log_probs(model: str, dtype: str, sequences: int, length: int) -> torch.Tensor:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        rows = [
            plain(torch.from_numpy(tokens_T[None])).logits[0].float()
            for tokens_T in random_tokens(sequences, length)
        ]
    return torch.log_softmax(torch.cat(rows), 1)


def kl_by_quarter(true: torch.Tensor, found: torch.Tensor, sequences: int) -> list[float]:
    """nats, KL(true || found): the mean over each quarter of the positions."""
    true, found = true.double(), found.double()
    kl_BT = (true.exp() * (true - found)).sum(1).view(sequences, -1)
    return [float(quarter.mean()) for quarter in kl_BT.tensor_split(4, dim=1)]


LOG_PROBS = "tests.teacher.test_precision:engine_log_probs"


@pytest.fixture(scope="module")
def folder_long(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("positions")
    for name in POSITIONS:
        model_type, settings = MODELS[name]
        more = {"max_position_embeddings": 4096}
        if model_type == "gemma3_text":
            more["sliding_window"] = 1024
        save_random(folder / name, model_type, {**settings, **more}, seed=0)
    return str(folder)


POSITIONS = ("llama", "llama3", "yarn", "two bases")


@pytest.mark.parametrize(("ranks", "engine"), [(1, "tensor_parallel"), (2, "zero3")])
def test_late_positions_say_what_plain_transformers_says(folder_long, ranks, engine):
    of = {"model": f"{folder_long}/llama", "sequences": 1, "length": 1024}
    plain = plain_log_probs(dtype="bfloat16", **of)
    for found in run_ranks(ranks, LOG_PROBS, engine=engine, **of):
        assert max(kl_by_quarter(plain, found, 1)) <= 1e-4


@pytest.mark.long
@pytest.mark.models
@pytest.mark.parametrize("name", POSITIONS)
def test_every_quarter_of_4096_positions_is_as_exact_as_plain_transformers(folder_long, name):
    of = {"model": f"{folder_long}/{name}", "sequences": 2, "length": 4096}
    plain, exact = plain_log_probs(dtype="bfloat16", **of), plain_log_probs(dtype="float32", **of)
    rounding = kl_by_quarter(exact, plain, 2)
    [whole] = run_ranks(1, LOG_PROBS, engine="tensor_parallel", **of)
    log.info("%s: KL(float32 || plain bfloat16) %s", name, rounding)
    log.info("tp=1: KL(plain bfloat16 || engine) %s", kl_by_quarter(plain, whole, 2))
    assert max(kl_by_quarter(plain, whole, 2)) <= 1e-4
    for found in run_ranks(2, LOG_PROBS, engine="zero3", **of):
        log.info("zero3: KL(plain bfloat16 || engine) %s", kl_by_quarter(plain, found, 2))
        assert max(kl_by_quarter(plain, found, 2)) <= 1e-4
    halves = run_ranks(2, LOG_PROBS, tp=2, engine="tensor_parallel", **of)
    sharded = kl_by_quarter(exact, torch.cat(halves, 1), 2)
    log.info("tp=2: KL(float32 || engine) %s", sharded)
    assert all(a <= 1.25 * b for a, b in zip(sharded, rounding, strict=True))


def student_buffers(mesh, model: str, init: str) -> dict[str, torch.Tensor]:
    from megadistill.config import StudentConfig
    from megadistill.student.model import load_student

    config = StudentConfig.model_validate({"model": model, "init": init})
    deepspeed = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    student = load_student(config, mesh, deepspeed_config=deepspeed)
    return {name: buffer.cpu().clone() for name, buffer in student.model.named_buffers()}


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_a_students_buffers_are_those_of_plain_transformers(folder, init):
    model = f"{folder}/deepseek_v3"
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    found = run_ranks(2, "tests.teacher.test_precision:student_buffers", model=model, init=init)
    for name, buffer in plain.named_buffers():
        for of_rank in found:
            if version("transformers").startswith("4.") and "inv_freq" not in name:
                continue  # it keeps no correction bias in float32
            assert of_rank[name].dtype == buffer.dtype == torch.float32
            if init == "pretrained" or "inv_freq" in name:
                assert torch.equal(of_rank[name], buffer)
