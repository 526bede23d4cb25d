"""The plan's memory of a rank is what a rank really holds."""

from __future__ import annotations

import pytest

from megadistill.config import Config
from megadistill.models.model_files import find_model
from megadistill.preflight.plan.shares import tensor_parallel_bytes, zero3_bytes
from tests.models.architectures import ARCHITECTURES, save_random
from tests.ranks import run_ranks

VOCAB = 1024
_SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": VOCAB}
MODELS = {
    "dense": ("llama", {"num_key_value_heads": 2, **_SIZES, "tie_word_embeddings": False}),
    "tied, biases": ("qwen2", {**_SIZES, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", _SIZES),
    "qwen3_moe": ("qwen3_moe", {**_SIZES, "moe_intermediate_size": 64}),
    "deepseek_v3": ("deepseek_v3", {**_SIZES, "moe_intermediate_size": 64}),
}


def config(model: str, engine: str, tp: int) -> Config:
    teacher = {"model": model, "engine": engine, "tp": tp, "dtype": "bfloat16"}
    data = {"source": "python-stdlib", "seq_len": 24, "pack": "concat"}
    return Config.model_validate({"data": data, "teacher": teacher})


def counted(mesh, models: list[str], engine: str) -> list[int]:
    """Bytes of parameters, buffers and the slice of the head on this rank, between forwards."""
    from megadistill.teacher.engine import load_teacher

    found = []
    for model in models:
        teacher = load_teacher(config(model, engine, mesh.tp), mesh, vocab_size=VOCAB)
        module, head = teacher.engine.module, teacher.head
        held = [*module.parameters(), *module.buffers(), head.weight_VH]
        held += [p.ds_tensor for p in module.parameters() if hasattr(p, "ds_tensor")]
        found.append(sum(tensor.nbytes for tensor in held))
    return found


@pytest.mark.parametrize(
    ("ranks", "tp", "engine", "names"),
    [
        (2, 2, "tensor_parallel", ["tied, biases", "deepseek_v3"]),
        (2, 1, "zero3", ["tied, biases", "deepseek_v3"]),
        *(
            pytest.param(*case, list(MODELS), marks=[pytest.mark.long, pytest.mark.models])
            for case in ((1, 1, "tensor_parallel"), (2, 2, "tensor_parallel"), (2, 1, "zero3"))
        ),
    ],
)
def test_the_plan_counts_what_a_rank_holds(tmp_path, ranks, tp, engine, names):
    models = []
    for name in names:
        model_type, more = MODELS[name]
        settings = ARCHITECTURES[model_type].settings | more
        models.append(save_random(tmp_path / name, model_type, settings, seed=0))
    results = run_ranks(
        ranks, "tests.preflight.test_shares:counted", tp=tp, models=models, engine=engine
    )
    for index, model in enumerate(models):
        held = max(result[index] for result in results)
        files = find_model(model, key="teacher.model")
        if engine == "zero3":
            planned, _ = zero3_bytes(config(model, engine, tp), files, ranks)
        else:
            planned = tensor_parallel_bytes(config(model, engine, tp), files)
        assert planned == pytest.approx(held, rel=0.02), (names[index], planned, held)
