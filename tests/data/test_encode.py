from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from megadistill.config import Config
from megadistill.data.encode import Encoder, Unit
from megadistill.data.tokenizer import encoder_spec, load_tokenizer, tokenizer_identity
from megadistill.errors import ConfigError


@pytest.fixture
def hf(tokenizer):
    return AutoTokenizer.from_pretrained(tokenizer)


def encode(hf, *units):
    ids, lengths, mask = Encoder(encoder_spec(hf)).encode(list(units))
    assert lengths.sum() == len(ids)
    return ids.tolist(), lengths.tolist(), None if mask is None else mask.tolist()


def learned(hf, ids, mask):
    """The text of each stretch of learned tokens."""
    stretches, current = [], []
    for token, on in zip([*ids, 0], [*mask, 0], strict=True):
        if on:
            current.append(token)
        elif current:
            stretches.append(hf.decode(current))
            current = []
    return stretches


def test_a_document_ends_with_the_end_token_and_an_empty_one_is_dropped(hf):
    ids, lengths, mask = encode(hf, Unit(0, text="def f():"), Unit(1, text=""), Unit(2, text="x"))
    assert hf.decode(ids) == "def f():<|end|>x<|end|>"
    assert lengths[1] == 0
    assert mask is None


def test_the_pieces_of_a_document_have_one_end_token_together(hf):
    first = Unit(0, 0, True, False, "a = 1\n")
    ids, _, _ = encode(hf, first, Unit(0, 1, False, False, "b"), Unit(0, 2, False, True, " = 2"))
    assert hf.decode(ids) == "a = 1\nb = 2<|end|>"


def test_a_begin_token_is_added_where_the_tokenizer_adds_one(hf):
    backend = hf.backend_tokenizer
    backend.add_special_tokens(["<|begin|>"])
    begin = backend.token_to_id("<|begin|>")
    hf.add_special_tokens({"bos_token": "<|begin|>"})
    assert encode(hf, Unit(0, text="x"))[0][0] != begin
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    assert hf.decode(encode(hf, Unit(0, text="x"))[0]) == "<|begin|>x<|end|>"


def test_settings_of_truncation_and_padding_in_the_file_change_nothing(hf):
    expected = encode(hf, Unit(0, text="x " * 100), Unit(1, text="y"))
    identity = tokenizer_identity(hf)
    hf.backend_tokenizer.enable_truncation(5)
    hf.backend_tokenizer.enable_padding(length=50)
    assert encode(hf, Unit(0, text="x " * 100), Unit(1, text="y")) == expected
    assert tokenizer_identity(hf) == identity


def test_only_the_completion_and_its_end_are_learned(hf):
    ids, lengths, mask = encode(
        hf,
        Unit(0, prompt="Question: 1?", completion=" Answer"),
        Unit(1, prompt="no answer", completion=""),
    )
    assert hf.decode(ids) == "Question: 1? Answer<|end|>"
    assert learned(hf, ids, mask) == [" Answer<|end|>"]
    assert lengths[1] == 0


def test_the_tokenizers_identity_is_its_content(hf, tokenizer, tmp_path):
    hf.save_pretrained(tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert tokenizer_identity(copy) == tokenizer_identity(hf)
    copy.add_tokens(["another"])
    assert tokenizer_identity(copy) != tokenizer_identity(hf)


def test_a_tokenizer_without_an_end_token_is_refused(hf, tmp_path):
    hf.eos_token = None
    hf.save_pretrained(tmp_path)
    config = Config(data={"source": "python-stdlib"}, teacher={"model": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"teacher.model: .* set eos_token in"):
        load_tokenizer(config)


def test_a_chat_without_a_template_is_refused(tokenizer):
    data = {"files": ["x.jsonl"], "messages_field": "messages", "tokenizer": tokenizer}
    config = Config(data=data, teacher={"model": "elsewhere"})
    with pytest.raises(ConfigError, match=r"data.tokenizer: .* has no chat template"):
        load_tokenizer(config)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    (tmp_path / "readme").write_text("nothing")
    config = Config(data={"source": "python-stdlib"}, teacher={"model": str(tmp_path)})
    with pytest.raises(
        ConfigError, match=r"^teacher.model: .*: no tokenizer can be loaded"
    ) as info:
        load_tokenizer(config)
    assert "\n" not in str(info.value)
    assert Path(tmp_path, "readme").exists()
