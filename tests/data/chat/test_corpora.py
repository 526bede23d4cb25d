"""Corpora of chats: columns, documents that cannot be used, and stores that were begun earlier."""

from pathlib import Path

import numpy as np
import pytest

from megadistill.data.counts import statistics
from megadistill.data.tokens import build_tokens
from megadistill.errors import BadDocumentError
from tests.data.chat.stores import config, decoded, write
from tests.data.chats import CHAT, CHATML, TEMPLATES, TOOLS, marked, stock


def test_a_column_of_tools_is_read_where_it_is_there(tmp_path, model):
    template, special, eos = TEMPLATES["tools"]
    hf = model(stock(template), special, eos)
    rows = [{"messages": CHAT, "tools": TOOLS if i % 2 else None} for i in range(9)]
    store = build_tokens(config(tmp_path, files=[write(tmp_path / "a.jsonl", rows)]))
    assert store.recipe["source"]["fields"] == ["messages", "tools"]
    assert decoded(store, hf).count("<|tools|>") == 4


def test_prompts_and_completions_may_be_lists_of_turns(tmp_path, model):
    hf = model()
    rows = [{"prompt": CHAT[:3], "completion": CHAT[3:]}] * 9
    store = build_tokens(config(tmp_path, files=[write(tmp_path / "a.jsonl", rows)]))
    tokens, mask = (np.concatenate([s[c] for s in store]) for c in ("tokens", "loss_mask"))
    assert hf.decode(tokens[mask == 1]).startswith("It is 4.<|im_end|>It is 4.<|im_end|>")
    assert store.recipe["tokenizer"]["assistant_mask"] == "generated"


def test_one_bad_turn_is_said_with_its_file_row_and_turn_or_left_out(tmp_path, model):
    model()
    bad = [*CHAT, {"role": "assistant", "content": 42}]
    rows = [{"messages": CHAT}] * 30 + [{"messages": bad}] + [{"messages": CHAT}] * 3
    path = write(tmp_path / "a.jsonl", rows)
    said = (
        r"a.jsonl: line 31: column 'messages': turn 4: expected text as content, found the number"
    )
    with pytest.raises(BadDocumentError, match=said):
        build_tokens(config(tmp_path, files=[path]))
    assert not Path(tmp_path / "tokens").exists()
    skipping = config(tmp_path, files=[path], on_bad_document="skip")
    assert statistics(build_tokens(skipping))["skipped_documents"] == 1


@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        (
            {"messages_field": "dialog"},
            [{"dialog": [*CHAT, 7]}],
            "column 'dialog': turn 4: expected",
        ),
        (
            {"messages_field": "dialog", "tools_field": "schemas"},
            [{"dialog": CHAT, "schemas": ["no"]}],
            "column 'schemas': tool 0: expected JSON",
        ),
        (
            {"prompt_field": "asked", "completion_field": "said"},
            [{"asked": CHAT[:3], "said": [{"role": "assistant", "content": 4}]}],
            "column 'said': turn 0: expected text as content",
        ),
        (
            {"prompt_field": "asked", "completion_field": "said"},
            [{"asked": [{"role": "critic"}], "said": CHAT[3:]}],
            "column 'asked': turn 0: has neither",
        ),
        (
            {"prompt_field": "asked", "completion_field": "said"},
            [{"asked": "What?", "said": "That."}, {"asked": "What?", "said": CHAT[3:]}],
            "column 'said': expected text as in the corpus' first document",
        ),
    ],
)
def test_what_is_wrong_with_a_chat_is_said_with_its_column(tmp_path, model, names, rows, said):
    model()
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(BadDocumentError) as refused:
        build_tokens(config(tmp_path, files=[path], **names))
    assert f"a.jsonl: line {len(rows)}: {said}" in str(refused.value)


@pytest.mark.parametrize("template", [stock(CHATML), marked(CHATML)])
def test_a_store_begun_earlier_continues_as_it_began(tmp_path, model, monkeypatch, template):
    hf = model(template)
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT, "tools": None}] * 40)
    old = {"files": [path], "messages_field": "messages", "packing": "in_order"}
    with monkeypatch.context() as patch:
        patch.setattr("megadistill.data.chat.settings._begun_earlier", lambda data: True)
        build_tokens(config(tmp_path, **old, max_samples=20))
    store = build_tokens(config(tmp_path, **old))
    assert "assistant_mask" not in store.recipe["tokenizer"]
    assert store.recipe["source"]["fields"] == ["messages"]
    tokens, mask = (np.concatenate([s[c] for s in store]) for c in ("tokens", "loss_mask"))
    # With a line break or not behind the end of a turn, as the rule of that time had it.
    end = "\n" if template == stock(CHATML) else ""
    first, last = f"It is 2.<|im_end|>{end}", f"It is 4.<|im_end|>{end}"
    assert hf.decode(tokens[mask == 1]).startswith((first + last + "<|im_end|>" * bool(end)) * 39)
    text = hf.apply_chat_template(CHAT, tokenize=False) + "<|im_end|>"
    assert hf.decode(tokens).startswith(text * 39)
