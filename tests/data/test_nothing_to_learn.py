"""A corpus without anything to learn ends tokenising, before the store is finished."""

import json
import logging

import pytest
from transformers import AutoTokenizer

from megadistill.blocks import open_store
from megadistill.config import Config
from megadistill.data.counts import statistics
from megadistill.data.tokens import build_tokens
from megadistill.errors import ConfigError, DataError

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer, tmp_path):
    hf = AutoTokenizer.from_pretrained(tokenizer)
    hf.chat_template = PLAIN
    hf.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def test_chats_without_an_assistants_turn_are_refused(config, tmp_path, chat_tokenizer):
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(50)]
    settings = config(files=write(tmp_path / "a.jsonl", rows), tokenizer=chat_tokenizer)
    for _ in range(2):  # the second run finds the blocks of the first
        with pytest.raises(DataError, match=r"none of the [0-9]+ tokens is learned: .* assistant"):
            build_tokens(settings)
    assert not open_store(settings.data.dir).complete()


def test_little_to_learn_is_said_with_its_percentage(config, tmp_path, caplog):
    rows = [{"prompt": "a long question " * 60, "completion": ""} for _ in range(3)]
    rows += [{"prompt": "a long question " * 200, "completion": "y"} for _ in range(3)]
    settings = config(files=write(tmp_path / "a.jsonl", rows))
    with caplog.at_level(logging.WARNING, logger="megadistill"):
        store = build_tokens(settings)
    counted = statistics(store)
    assert 0 < counted["learned_tokens"] < 0.01 * counted["tokens"]
    assert f"tokens are learned ({counted['learned_tokens']} of" in caplog.text


def test_a_corpus_of_which_all_is_skipped_is_refused(config, tmp_path):
    files = write(tmp_path / "a.jsonl", [{"text": i} for i in range(9)])
    with pytest.raises(DataError, match="empty: 9 documents without text were read, 9 of them"):
        build_tokens(config(files=files, on_bad_document="skip"))
    assert (tmp_path / "tokens.run" / "skipped.jsonl").read_text().count("\n") == 9


def test_positions_by_a_loss_mask_need_one_in_the_columns_found(config, tmp_path):
    plain = config(files=write(tmp_path / "a.jsonl", [{"text": "x"}]))
    changed = plain.model_dump() | {"targets": {"positions": "loss_mask"}}
    with pytest.raises(ConfigError, match="found the column 'text' alone"):
        build_tokens(Config.model_validate(changed))
    assert not (tmp_path / "tokens").exists()
