"""Tiny models and tokenizers, made on the spot: real ones of transformers and tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_llama(path: Path | str, *, vocab_size: int = 512, seed: int = 0, **sizes: Any) -> str:
    """Save a random Llama, float32, as safetensors under `path`, and say where."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        **sizes,
    }
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **settings)).save_pretrained(path)
    torch.set_rng_state(state)
    return str(path)


def tiny_tokenizer(path: Path | str, *, vocab_size: int = 512) -> str:
    """Save a byte-level BPE tokenizer, trained on a text that does not change: the licence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(Path(__file__).parents[2] / "LICENSE")], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(path)
    return str(path)


def tiny_model(path: Path | str, **settings: Any) -> str:
    """Both at `path`, as a trained model comes: a Llama (of these settings) and its tokenizer."""
    tiny_tokenizer(path)
    return tiny_llama(path, **settings)


def teacher_and_text(folder: Path, *, documents: int) -> Path:
    """A model in folder/teacher and a text of so many short documents in folder/text.jsonl."""
    tiny_model(folder / "teacher")
    line = '{"text": "the quick brown fox jumps over lazy dogs number %d while it rains"}\n'
    (folder / "text.jsonl").write_text("".join(line % i for i in range(documents)))
    return folder
