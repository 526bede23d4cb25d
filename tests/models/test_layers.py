"""What chosen layers give, of every architecture people distil."""

import numpy as np
import pytest
import torch

from megadistill.errors import ConfigError
from megadistill.models.attention import forward_inputs
from megadistill.models.layers import decoder_layers, layer_pairs, watched
from tests.models.architectures import ARCHITECTURES, VOCAB, save_architecture


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_watched_layers_give_what_transformers_says_of_them(tmp_path, name):
    from transformers import AutoModelForCausalLM

    save_architecture(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens_BT = np.random.default_rng(0).integers(VOCAB, size=(2, 7))
    inputs = forward_inputs(model, tokens_BT, [np.zeros(1), np.array([0, 3])])
    last = model.config.num_hidden_layers
    with torch.no_grad(), watched(model, hidden=[1, last], attention=[1]) as seen:
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert set(seen.hidden) == {1, last}
    torch.testing.assert_close(seen.hidden[1], output.hidden_states[1])
    weights = seen.attention[1]
    torch.testing.assert_close(weights, output.attentions[0])
    assert weights.shape == (2, model.config.num_attention_heads, 7, 7)
    if ARCHITECTURES[name].pack == "isolate":
        assert not weights[1, :, 3:, :3].any()  # of another document
    with torch.no_grad():
        model(**inputs)
    assert seen.attention[1] is weights  # nobody watches any more


def test_without_weights_to_give_it_is_said(tmp_path):
    from transformers import AutoModelForCausalLM

    save_architecture(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    with (
        pytest.raises(ConfigError, match=r"LlamaAttention gives no attention weights: set teacher"),
        watched(model, attention=[1]),
    ):
        model(input_ids=torch.arange(4)[None])
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has no list of its 2 layers"):
        decoder_layers(model)


def test_layers_are_counted_from_either_end():
    pairs = [(1, -1), (-4, 2), (4, -2)]
    assert layer_pairs(pairs, teacher=4, student=2, key="k") == [(1, 2), (1, 2), (4, 1)]
    for wrong in ((0, 1), (5, 1), (-5, 1), (1, 3), (1, -3)):
        with pytest.raises(ConfigError, match=r"^k\.1: the (teacher|student) has \d layers"):
            layer_pairs([(1, 1), wrong], teacher=4, student=2, key="k")
