"""The student under ZeRO-3: the weights it starts with, and models that are refused."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel, Gemma2Config

from megadistill.config import StudentConfig
from megadistill.errors import ConfigError
from megadistill.models.experts import expert_blocks, router_loss, router_loss_weight
from megadistill.student.model import Student, check_fits, replace_head, student_settings
from tests.forked import Ranks
from tests.models.architectures import ARCHITECTURES, VOCAB, save_architecture
from tests.ranks import run_ranks
from tests.train.stores import make_config, make_store


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize("world", [1, 2])
def test_partitioned_weights_are_those_of_a_plain_model(tmp_path, init, world):
    config = make_config(tmp_path)
    config = config.model_copy(
        update={
            "student": config.student.model_copy(update={"init": init}),
            "train": config.train.model_copy(update={"seed": 7}),
        }
    )
    found = run_ranks(world, "tests.train.runs:weights", config=config)[0]
    folder = config.student.model
    if init == "pretrained":
        plain = AutoModelForCausalLM.from_pretrained(folder)
    else:
        torch.manual_seed(7)
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    expected = dict(plain.named_parameters())
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.detach().numpy(), err_msg=name)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_a_soft_cap_of_the_architecture_is_applied():
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, final_logit_softcapping=0.5))
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # far into the cap
    Student(model).check_head(name="student.model", device=torch.device("cpu"))


def test_logits_made_in_an_unknown_way_are_refused():
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, final_logit_softcapping=0.5))
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    student = Student(model)
    student.head.softcap = None
    with pytest.raises(ConfigError, match=r"student.model: Gemma2.* makes its logits in a way"):
        student.check_head(name="student.model", device=torch.device("cpu"))


def test_a_model_that_is_not_a_causal_language_model_is_refused():
    bert = BertModel(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=64,
        )
    )
    with pytest.raises(ConfigError, match=r"BertModel has no output projection"):
        replace_head(bert)


def test_too_few_ids_or_too_little_context_is_refused():
    settings = AutoConfig.for_model("llama", vocab_size=96, max_position_embeddings=32)
    check_fits(settings, vocab_size=90, seq_len=32)
    with pytest.raises(ConfigError, match=r"has 96 token ids, .* 97"):
        check_fits(settings, vocab_size=97, seq_len=32)
    with pytest.raises(ConfigError, match=r"data\.seq_len: 33 is beyond the 32 positions"):
        check_fits(settings, vocab_size=96, seq_len=33)


def test_a_student_has_no_dropout(tmp_path):
    """GPT-2 comes with 0.1 in three places; its head was refused for the noise."""
    folder = save_architecture(tmp_path, "gpt2")
    assert AutoConfig.from_pretrained(folder).resid_pdrop == 0.1
    settings = student_settings(StudentConfig(model=folder))
    model = AutoModelForCausalLM.from_config(settings)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    Student(model.train()).check_head(name="student.model", device=torch.device("cpu"))
    assert model.training


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_blocks_of_experts_are_found_where_there_are_any(name, tmp_path):
    a = ARCHITECTURES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(name, vocab_size=64, **a.settings)
        )
    assert bool(expert_blocks(model)) == a.experts
    assert router_loss_weight(model) == 0  # only where config.json says output_router_logits


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_loss_of_routers_counts_no_padding(name):
    a = ARCHITECTURES[name]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, vocab_size=VOCAB, **a.settings)
    )
    generator = torch.Generator().manual_seed(0)
    experts = expert_blocks(model)[0].gate.weight.shape[0]
    logits = [torch.randn(2, 8, experts, generator=generator) for _ in range(3)]
    mask_BT = torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
    found = router_loss(model, tuple(each.flatten(0, 1) for each in logits), mask_BT)
    expected = router_loss(model, tuple(each[mask_BT == 1] for each in logits))
    torch.testing.assert_close(found, expected)
    assert found != router_loss(model, tuple(each.flatten(0, 1) for each in logits))


def train_mixtral(config):
    """On a rank that has not met the architecture before: its module is imported on the way."""
    import sys

    from megadistill import parallel
    from megadistill.train.loop import train

    assert "transformers.models.mixtral.modeling_mixtral" not in sys.modules
    with parallel.joined() as mesh:
        train(config, mesh)
    AutoModelForCausalLM.from_pretrained(config.student.model)(torch.arange(4)[None])


def test_another_model_of_experts_can_be_made_beside_the_student(tmp_path):
    """Their class, defined inside deepspeed.zero.Init, lost the decoration of its constructor."""
    save_architecture(tmp_path / "model", "mixtral")
    make_store(tmp_path / "cache", seed=1, vocab=VOCAB)
    config = make_config(tmp_path, train={"steps": 2})
    with Ranks(2, "tests.student.test_model:train_mixtral", config, folder=tmp_path / "n") as ranks:
        assert ranks.wait(120) == [0, 0], ranks.said()
