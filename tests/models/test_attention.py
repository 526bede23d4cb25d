"""Packed documents: what one sees, another in the same sequence does not."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MistralConfig

from megadistill.errors import ConfigError
from megadistill.models.attention import check_isolation, forward_inputs
from megadistill.models.pretrained import backbone

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = LlamaConfig(**SIZES)
MISTRAL = MistralConfig(**SIZES, sliding_window=3)
GPT2 = GPT2Config(
    n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64, resid_pdrop=0.0, embd_pdrop=0.0
)
DOCUMENTS = [np.array([0, 1, 5]), np.array([0]), np.array([0, 11])]


def build(config, attention="sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, 64, (3, 12))


def test_positions_restart_at_every_document():
    inputs = forward_inputs(build(LLAMA), tokens(), DOCUMENTS)
    assert inputs["position_ids"].tolist() == [
        [0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6],
        list(range(12)),
        [*range(11), 0],
    ]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", [LLAMA, MISTRAL, GPT2], ids=["llama", "window", "gpt2"])
def test_a_gradient_does_not_cross_documents(config, attention):
    model = build(config, attention)
    inputs = forward_inputs(model, tokens(), DOCUMENTS)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, **inputs).logits
    logits[0, 5:].square().sum().backward(retain_graph=True)
    moved = embedded.grad.abs().sum(-1)
    assert (moved[0, 5:] > 0).all()
    assert moved[0, :5].sum() == 0
    assert moved[1:].sum() == 0

    embedded.grad = None
    logits[0, 1:5].square().sum().backward()
    moved = embedded.grad.abs().sum(-1)
    assert (moved[0, 1:5] > 0).all()
    assert moved[0, 5:].sum() == 0
    assert moved[0, 0] == 0


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, GPT2], ids=["llama", "window", "gpt2"])
def test_a_packed_document_gives_what_it_gives_alone(config):
    model = build(config).eval()
    packed = model(**forward_inputs(model, tokens(), DOCUMENTS)).logits
    alone = model(torch.as_tensor(tokens()[:1, 5:])).logits
    torch.testing.assert_close(packed[:1, 5:], alone, rtol=1e-5, atol=1e-5)


def test_concat_lets_every_position_see_all_before_it():
    model = build(LLAMA).eval()
    packed = model(**forward_inputs(model, tokens(), DOCUMENTS, pack="concat")).logits
    torch.testing.assert_close(packed, model(torch.as_tensor(tokens())).logits)


def test_sequences_laid_end_to_end_for_flash_attention_give_the_same():
    model = build(LLAMA).eval()
    expected = model(**forward_inputs(model, tokens(), DOCUMENTS)).logits.reshape(36, -1)
    model.config._attn_implementation = "flash_attention_2"
    inputs = forward_inputs(model, tokens(), DOCUMENTS)
    model.config._attn_implementation = "sdpa"
    assert inputs["input_ids"].shape == (1, 36)
    torch.testing.assert_close(model(**inputs).logits[0], expected)


def test_a_model_that_isolates_passes_the_check():
    for config in (LLAMA, MISTRAL, GPT2):
        check_isolation(backbone(build(config)), name="tiny", seq_len=12, vocab_size=64)


class Concatenating(torch.nn.Module):
    """A causal model that takes no notice of documents."""

    def __init__(self):
        super().__init__()
        self.inner = backbone(build(LLAMA))
        self.config, self.dtype = self.inner.config, self.inner.dtype

    def forward(self, input_ids, **_):
        return self.inner(input_ids)


def test_a_model_that_does_not_isolate_is_refused():
    with pytest.raises(ConfigError, match=r"data\.pack: isolate, but in tiny \(llama"):
        check_isolation(Concatenating(), name="tiny", seq_len=12, vocab_size=64)


def test_documents_of_a_model_with_a_state_are_not_packed():
    model = build(
        MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=64), "eager"
    )
    forward_inputs(model, tokens()[:1], [np.zeros(1, np.int64)])
    forward_inputs(model, tokens(), DOCUMENTS, pack="concat")
    with pytest.raises(ConfigError, match="model_type mamba carries a state from token to token"):
        forward_inputs(model, tokens(), DOCUMENTS)
