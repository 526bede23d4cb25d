"""Tokenizers and corpora of chats."""

import pytest

from tests.data.chat.stores import SPECIAL, write
from tests.data.chats import CHATML, byte_tokenizer, stock


@pytest.fixture
def hf():
    return byte_tokenizer(SPECIAL, eos="<|im_end|>")


@pytest.fixture
def model(tmp_path):
    """A folder with a tokenizer whose template is CHATML."""

    def save(template=None, special=SPECIAL, eos="<|im_end|>"):
        hf = byte_tokenizer(special, eos=eos)
        hf.chat_template = template or stock(CHATML)
        hf.save_pretrained(tmp_path / "model")
        return hf

    return save


@pytest.fixture
def chats(tmp_path):
    rows = []
    for i in range(60):
        answer = {"role": "assistant", "content": f"It is {i}." * (i % 7)}
        rows.append({"messages": [{"role": "user", "content": f"What is {i}?"}, answer]})
    return write(tmp_path / "chats.jsonl", rows)
