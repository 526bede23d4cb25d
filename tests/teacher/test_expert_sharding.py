"""Stacked experts are sharded over tensor-parallel ranks, or refused by name."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megadistill.config import Config
from megadistill.teacher.expert_sharding import cut_while_loading
from tests.models.architectures import VOCAB, save_architecture, save_random
from tests.models.mixtures import MIXTURES
from tests.ranks import run_ranks
from tests.teacher.test_architectures import small_batch
from tests.teacher.test_engine import plain_log_probs

SAMPLE = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def sharded(mesh, models: dict[str, str], attention: dict[str, str]) -> dict:
    """Log-probabilities of this rank's slice and bytes of its experts, or the refusal."""
    from megadistill.errors import MegadistillError
    from megadistill.teacher.engine import load_teacher

    found = {}
    for name, model in models.items():
        section = {
            "model": model,
            "tp": mesh.tp,
            "dtype": "float32",
            "attention": attention.get(name, "sdpa"),
        }
        data = {"source": "python-stdlib", "seq_len": 24, "pack": "concat"}
        config = Config.model_validate({"data": data, "teacher": section})
        try:
            teacher = load_teacher(config, mesh, vocab_size=VOCAB)
        except MegadistillError as error:
            found[name] = str(error)
            continue
        log_probs = teacher.head.log_probs(teacher.hidden(*small_batch())).clone()
        found[name] = (log_probs, expert_bytes(teacher.engine.module))
    return found


def expert_bytes(model) -> int:
    return sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)


def check(models: dict[str, str], attention: dict[str, str], *, tp: int) -> dict[str, str]:
    """Compares with plain transformers; the refusals, by architecture."""
    results = run_ranks(
        tp, "tests.teacher.test_expert_sharding:sharded", tp=tp, models=models, attention=attention
    )
    refused, wrong = {}, {}
    for name, model in models.items():
        if isinstance(results[0][name], str):
            refused[name] = results[0][name]
            continue
        found = torch.cat([result[name][0] for result in results], 1)
        how = attention.get(name, "sdpa")
        expected = plain_log_probs(model, inputs=small_batch(), pack="concat", attention=how)
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        most = max(result[name][1] for result in results) / expert_bytes(whole)
        difference = float((found - expected).abs().max())
        if not (difference < 1e-5 and most <= 1 / tp * 1.05):
            wrong[name] = difference, most
    assert not wrong
    return refused


def test_experts_are_sharded_and_counted_once(tmp_path):
    models = {name: save_architecture(tmp_path / name, name) for name in SAMPLE}
    assert not check(models, {"gpt_oss": "eager"}, tp=2)


@pytest.mark.skipif(version("transformers").startswith("4."), reason="it has lists of modules")
def test_experts_are_cut_while_they_are_loaded(tmp_path):
    folder = save_architecture(tmp_path, "mixtral")  # a file with each expert's matrices apart
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with cut_while_loading(rank=1, ranks=2):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found, expected = dict(model.named_parameters()), dict(whole.named_parameters())
    assert set(found) == set(expected)
    width = whole.config.intermediate_size
    columns = torch.arange(width // 2, width)
    for name, value in expected.items():
        if name.endswith("experts.gate_up_proj"):
            value = value[:, torch.cat([columns, width + columns])]
        elif name.endswith("experts.down_proj"):
            value = value[:, :, columns]
        assert torch.equal(found[name], value), name


@pytest.mark.long
@pytest.mark.models
@pytest.mark.parametrize("tp", [2, 4])
def test_every_mixture_is_right_or_refused_by_name(tmp_path, tp):
    models = {}
    for name, settings in MIXTURES.items():
        try:
            AutoConfig.for_model(name)
        except ValueError:
            continue  # not in this version of transformers
        more = {"num_key_value_heads": 4} if "num_key_value_heads" in settings else {}
        models[name] = save_random(tmp_path / name, name, settings | more, seed=0)
    refused = check(models, {}, tp=tp)
    for name, said in refused.items():
        assert said.startswith(f"teacher.tp: {tp}: "), name
        assert f"({name})" in said or "the experts of " in said, said
        assert "teacher.engine=zero3" in said, name
    if not version("transformers").startswith("4."):
        assert set(refused) == REFUSED, refused


# Norms over all heads (OLMoE, FlexOlmo, MiniMax-M2), fused shared experts, identity experts, and
# experts stacked in ways of their own.
REFUSED = {
    "olmoe",
    "flex_olmo",
    "minimax_m2",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "longcat_flash",
    "jetmoe",
    "dbrx",
}
