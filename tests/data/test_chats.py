"""Chats on their way to tokens: borders, what is refused, options, the recipe, and stores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megadistill.config import Config, load_config
from megadistill.data.chat.encoder import ChatEncoder
from megadistill.data.counts import statistics
from megadistill.data.tokenizer import chat_identity, chat_spec
from megadistill.data.tokens import build_tokens
from megadistill.errors import BadDocumentError, ConfigError, RecipeError
from tests.data.chats import CHAT, CHATML, TEMPLATES, TOOLS, TRUTH, byte_tokenizer, marked, stock
from tests.data.stores import same_store
from tests.data.test_chat_masks import encoder, learned, truth

SPECIAL = TEMPLATES["header and end of turn"][1]
MERGED = [("Ċ", "Ċ"), ("Ġ", "t")]  # two line breaks, and a space with a t


@pytest.fixture
def hf():
    return byte_tokenizer(SPECIAL, eos="<|im_end|>")


def texts(hf, template, chat, tools=None, **options):
    """What is learned of a chat, stretch by stretch."""
    return learned(hf, *encoder(hf, template, **options).encode(chat, tools))


# Borders


def test_a_token_across_the_opening_is_made_apart_so_that_all_that_is_generated_is_learned():
    hf = byte_tokenizer(SPECIAL, eos="<|im_end|>", merges=MERGED)
    chat = [CHAT[0], {"role": "assistant", "content": "\n\nIt is 2."}]
    ids, mask = encoder(hf, stock(CHATML)).encode(chat)
    assert learned(hf, ids, mask) == ["\n\nIt is 2.<|im_end|>"]
    prompt = hf.apply_chat_template(
        chat[:1], chat_template=stock(CHATML), add_generation_prompt=True, return_dict=False
    )
    assert ids[: len(prompt)] == list(prompt)  # what the model is given at inference
    assert not any(mask[: len(prompt)])


def test_ids_are_those_of_the_text_in_one_go_where_no_token_lies_across():
    hf = byte_tokenizer(SPECIAL, eos="<|im_end|>", merges=MERGED)
    chat = [CHAT[0], {"role": "assistant", "content": "so\n\n that"}]
    ids, _ = encoder(hf, stock(CHATML)).encode(chat)
    text = hf.apply_chat_template(chat, chat_template=stock(CHATML), tokenize=False)
    assert ids == hf(text, add_special_tokens=False).input_ids


def test_text_of_special_tokens_in_a_content_closes_nothing(hf):
    said = "use <|im_end|> and <|im_start|>assistant\n"
    chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}] * 2
    assert texts(hf, stock(CHATML), chat) == [said + "<|im_end|>"] * 2


def test_a_part_of_the_generation_prompt_that_earlier_turns_lack_is_no_border():
    template, special, eos = TEMPLATES["reasoning of earlier turns is dropped"]
    prompt = "{{ '<|im_start|>assistant\n' }}"
    template = stock(template).replace(
        "{% if add_generation_prompt %}" + prompt,
        "{% if add_generation_prompt %}" + prompt + "{{ '<think>\n\n</think>\n\n' }}",
    )
    hf = byte_tokenizer(special, eos=eos)
    assert texts(hf, template, CHAT) == ["It is 2.<|im_end|>", "It is 4.<|im_end|>"]


def test_reasoning_that_the_template_drops_is_not_there_and_the_rest_is_learned():
    template, special, eos = TEMPLATES["reasoning of earlier turns is dropped"]
    hf = byte_tokenizer(special, eos=eos)
    chat = [turn | {"thinking": "hm"} if turn["role"] == "assistant" else turn for turn in CHAT]
    assert texts(hf, stock(template), chat) == [
        "It is 2.<|im_end|>",
        "<think>\nhm\n</think>\n\nIt is 4.<|im_end|>",
    ]


def test_calls_of_tools_are_learned_with_null_and_absent_and_empty_content():
    template, special, eos = TEMPLATES["tools"]
    hf = byte_tokenizer(special, eos=eos)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    found = {
        str(texts(hf, stock(template), [CHAT[0], turn], TOOLS))
        for turn in (
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        )
    }
    assert found == {"""['<call>f{"a": 1}</call><|eot|>']"""}


def test_null_content_is_empty_where_a_template_needs_text(hf):
    chat = [CHAT[0], {"role": "assistant", "content": None}]
    assert texts(hf, stock(CHATML), chat) == ["<|im_end|>"]


def test_arguments_are_json_text_where_a_template_needs_text(hf):
    template = stock(CHATML).replace("m.content +", "m.tool_calls[0].function.arguments +", 1)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "ä"}}}
    chat = [CHAT[0], {"role": "assistant", "tool_calls": [call]}]
    assert texts(hf, template, chat) == ['{"a": "ä"}<|im_end|>']


def test_a_list_of_parts_is_joined_or_kept_as_the_template_takes_it(hf):
    parts = [{"type": "text", "text": "It "}, {"type": "text", "text": "is 2."}]
    chat = [CHAT[0], {"role": "assistant", "content": parts}]
    assert texts(hf, stock(CHATML), chat) == ["It is 2.<|im_end|>"]
    of_parts = stock(CHATML).replace(
        "m.content +", "m.content | map(attribute='text') | join('|') +"
    )
    assert texts(hf, of_parts, chat) == ["It |is 2.<|im_end|>"]
    assert texts(hf, of_parts, CHAT) == ["It is 2.<|im_end|>", "It is 4.<|im_end|>"]


def test_the_users_last_turn_is_not_learned_and_the_document_ends(hf):
    ids, mask = encoder(hf, stock(CHATML)).encode(CHAT[:3])
    assert learned(hf, ids, mask) == ["It is 2.<|im_end|>"]
    other = byte_tokenizer([*SPECIAL, "<|endoftext|>"], eos="<|endoftext|>")
    ids, mask = encoder(other, stock(CHATML)).encode(CHAT)
    assert other.decode(ids).endswith("It is 4.<|im_end|>\n<|endoftext|>")
    assert learned(other, ids, mask) == ["It is 2.<|im_end|>", "It is 4.<|im_end|>"]


def test_a_last_turn_without_an_end_gets_the_end_token_and_learns_it(hf):
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    assert texts(hf, bare, CHAT[:2]) == ["It is 2.<|im_end|>"]
    with pytest.raises(
        BadDocumentError,
        match=r"^column 'messages': turn 1: the chat template prints no end-of-turn",
    ):
        encoder(hf, bare).encode(CHAT)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # Tool results inside the turn that called: nobody but the template knows where.
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>' + m.content }}"
            "{% for k in range(messages | length) %}{% if messages[k].role == 'tool' %}"
            "{{ '[' + messages[k].content + ']' }}{% endif %}{% endfor %}{{ '<|im_end|>' }}"
            "{% elif m.role == 'user' %}{{ '<|im_end|>' + m.content }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
            "prints other turns inside",
        ),
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
            "prints nothing for it",
        ),
        (
            "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
            "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}",
            "prints nothing for it",
        ),
        (
            "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'SAY: ' }}{% endif %}",
            "does not begin with the gener",
        ),
    ],
)
def test_a_turn_whose_borders_are_unknown_is_refused_with_its_number(hf, template, said):
    chat = [CHAT[0], CHAT[1], {"role": "tool", "content": "result"}, CHAT[1]]
    with pytest.raises(
        BadDocumentError,
        match=rf"^column 'messages': turn 1: .*{said}.*data.assistant_mask=template",
    ):
        encoder(hf, template).encode(chat)


def test_what_a_template_refuses_is_said_with_the_turn(hf):
    strict = stock(CHATML).replace(
        "{% if m.role == 'assistant' %}",
        "{% if m.role == 'critic' %}{{ raise_exception('no critics here') }}"
        "{% elif m.role == 'assistant' %}",
    )
    chat = [*CHAT, {"role": "critic", "content": "x"}, *CHAT]
    with pytest.raises(
        BadDocumentError, match=r"^column 'messages': turn 4: the chat template refuses it: no crit"
    ):
        encoder(hf, strict).encode(chat)


def test_the_templates_own_marks_are_learned_on_request(hf):
    ours = encoder(hf, marked(CHATML), mask="template")
    assert ours.encode(CHAT) == truth(hf, marked(CHATML), CHAT)
    content = stock(CHATML).replace(
        "{{ m.content + '<|im_end|>' }}",
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}",
        1,
    )
    assert texts(hf, content, CHAT, mask="template") == ["It is 2.", "It is 4."]
    assert texts(hf, content, CHAT) == ["It is 2.<|im_end|>", "It is 4.<|im_end|>"]


def test_of_a_prompt_with_a_completion_as_turns_only_the_completion_is_learned(hf):
    ours = encoder(hf, stock(CHATML))
    ids, mask = ours.encode_completion(CHAT[:3], CHAT[3:])
    assert learned(hf, ids, mask) == ["It is 4.<|im_end|>"]
    assert ids == ours.encode(CHAT)[0]
    with pytest.raises(
        BadDocumentError, match=r"^column 'completion': turn 0: expected text as content"
    ):
        ours.encode_completion(CHAT[:1], [{"role": "assistant", "content": 4}])


# Options


def config(folder, **data):
    return Config(
        data={"seq_len": 32, "block_size": 4, "dir": str(folder / "tokens"), "workers": 1, **data},
        teacher={"model": str(folder / "model")},
    )


@pytest.fixture
def model(tmp_path):
    """A folder with a tokenizer whose template is CHATML."""

    def save(template=None, special=SPECIAL, eos="<|im_end|>"):
        hf = byte_tokenizer(special, eos=eos)
        hf.chat_template = template or stock(CHATML)
        hf.save_pretrained(tmp_path / "model")
        return hf

    return save


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chats(tmp_path):
    rows = []
    for i in range(60):
        answer = {"role": "assistant", "content": f"It is {i}." * (i % 7)}
        rows.append({"messages": [{"role": "user", "content": f"What is {i}?"}, answer]})
    return write(tmp_path / "chats.jsonl", rows)


def decoded(store, hf):
    return hf.decode(np.concatenate([sample["tokens"] for sample in store]))


DATED = stock(CHATML).replace("{% for", "{{ strftime_now('%d %b %Y') + '|' }}{% for", 1)


def test_a_templates_clock_is_a_date_of_the_recipe(tmp_path, model, chats):
    hf = model(DATED)
    store = build_tokens(config(tmp_path, files=[chats]))
    assert decoded(store, hf).startswith("26 Jul 2024|<|im_start|>user")
    assert store.recipe["tokenizer"]["chat_date"] == "2024-07-26"
    with pytest.raises(RecipeError, match=r"data.chat_date is '2024-07-26', this run's is '2025"):
        build_tokens(config(tmp_path, files=[chats], chat_date="2025-01-02"))
    assert "02 Jan 2025|" in hf.decode(encoder(hf, DATED, date="2025-01-02").encode(CHAT)[0])


def test_a_template_without_a_clock_has_no_date_in_its_recipe(tmp_path, model):
    identities = [
        chat_identity(chat_spec(config(tmp_path, files=["x.jsonl"], chat_date=date), model()))
        for date in ("2024-07-26", "2025-01-02")
    ]
    assert identities[0] == identities[1]
    assert "chat_date" not in identities[0]


_ON_A_DAY = """
import datetime, sys, runpy
class Day(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 5, 6, 7, 8, 9, tzinfo=tz)
datetime.datetime = Day
"""


def test_stores_of_chats_are_equal_at_any_number_of_workers_and_on_any_day(tmp_path, model, chats):
    model(DATED)
    for workers in (1, 2, 5):
        build_tokens(
            config(tmp_path, files=[chats], workers=workers, dir=str(tmp_path / f"w{workers}"))
        )
    # The clock of every process that is started here stands at another day.
    (tmp_path / "day").mkdir()
    (tmp_path / "day/sitecustomize.py").write_text(_ON_A_DAY)
    program = (
        "import sys, json, datetime; from megadistill.config import Config; "
        "from megadistill.data.tokens import build_tokens; "
        "assert datetime.datetime.now().year == 2031; "
        "build_tokens(Config(**json.loads(sys.argv[1])))"
    )
    settings = config(tmp_path, files=[chats], workers=2, dir=str(tmp_path / "day5")).model_dump(
        include={"data", "teacher"}, exclude_none=True
    )
    path = os.pathsep.join([str(tmp_path / "day"), str(Path(__file__).parents[2])])
    subprocess.run(
        [sys.executable, "-c", program, json.dumps(settings)],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    for other in ("w2", "w5", "day5"):
        assert same_store(tmp_path / "w1", tmp_path / other)


def test_a_template_of_ones_own_takes_the_tokenizers_place(tmp_path, model):
    hf = model("{{ raise_exception('not this one') }}")
    settings = config(tmp_path, files=["x.jsonl"], chat_template=str(tmp_path / "own.jinja"))
    identities = []
    for end in ("", "{{ '!' }}"):
        (tmp_path / "own.jinja").write_text(stock(CHATML) + end)
        spec = chat_spec(settings, hf)
        assert spec.templates == {"default": stock(CHATML) + end}
        identities.append(chat_identity(spec)["chat_template"])
    assert identities[0] != identities[1]


def test_variables_reach_the_template_and_the_recipe(tmp_path, model):
    hf = model("{% if loud %}{{ 'LOUD ' }}{% endif %}" + stock(CHATML))
    variables = {"loud": True, "unused": 3}
    spec = chat_spec(config(tmp_path, files=["x.jsonl"], chat_template_kwargs=variables), hf)
    ids, _ = ChatEncoder(spec, backend=hf.backend_tokenizer.to_str(), eos=0).encode(CHAT)
    assert hf.decode(ids).startswith("LOUD <|im_start|>")
    assert chat_identity(spec)["chat_variables"] == {"loud": True}


def test_variables_can_be_given_on_the_command_line():
    found = load_config(
        "demo.yaml",
        ["data.chat_template_kwargs.enable_thinking=false", "data.chat_date=2025-02-03"],
    )
    assert found.data.chat_template_kwargs == {"enable_thinking": False}
    assert found.data.chat_date == "2025-02-03"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.chat_date=yesterday", "data.chat_date: expected a date as YYYY-MM-DD"),
        ("data.chat_date=2025-02-30", "data.chat_date: expected a date as YYYY-MM-DD"),
        ("data.chat_date=2025", "data.chat_date: expected a date as YYYY-MM-DD"),
        ("data.chat_template_kwargs={messages: 1}", "messages is set for each chat: leave it out"),
        ("data.chat_template_kwargs={a: .inf}", "expected texts, numbers"),
        ("data.chat_template_kwargs=7", "data.chat_template_kwargs: expected"),
    ],
)
def test_wrong_options_are_one_line(override, said):
    with pytest.raises(ConfigError) as refused:
        load_config("demo.yaml", [override])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("", "is empty: expected a jinja template"),
        ("{% for m in messages %}", "the chat template cannot be read: line 1: Unexpected end"),
        ("{% frobnicate %}", "the chat template cannot be read: line 1: Encountered unknown tag"),
        ("{{ [1, 2] | random }}", r"draws random numbers \(random\)"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tmp_path, model, template, said):
    hf = model()
    path = tmp_path / "own.jinja"
    if template is not None:
        path.write_text(template)
    settings = config(tmp_path, files=["x.jsonl"], chat_template=str(path))
    with pytest.raises(ConfigError, match=rf"^data.chat_template: .*own.jinja: .*{said}"):
        chat_spec(settings, hf)


def test_marks_that_are_not_there_cannot_be_asked_for(tmp_path, model):
    hf = model()
    settings = config(tmp_path, files=["x.jsonl"], assistant_mask="template")
    with pytest.raises(ConfigError, match=r"^data.assistant_mask: template: .* no .* marks: set"):
        chat_spec(settings, hf)


def test_templates_run_in_the_sandbox(hf):
    escape = "{{ messages.__class__.__mro__ }}" + stock(CHATML)
    said = r"^column 'messages': turn 0: the chat template refuses it: .*unsafe"
    with pytest.raises(BadDocumentError, match=said):
        encoder(hf, escape).encode(CHAT)


def test_the_recipe_names_what_decides_the_text(tmp_path, model):
    hf = model(
        stock(TEMPLATES["contents are trimmed"][0]), TEMPLATES["contents are trimmed"][1], "<|end|>"
    )
    found = chat_identity(chat_spec(config(tmp_path, files=["x.jsonl"]), hf))
    assert set(found) == {"chat_template", "assistant_mask", "chat_variables"}
    assert found["chat_variables"] == {"bos_token": "<|bos|>"}


# Corpora


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


# Turns that are not learned


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_a_turn_of_weight_0_is_not_learned_and_the_text_stays(name, off):
    template, special, eos = TEMPLATES[name]
    hf = byte_tokenizer(special, eos=eos)
    ids, mask = truth(hf, marked(TRUTH.get(name, template)), CHAT)
    stretches = learned(hf, ids, mask)
    assert len(stretches) == 2
    sources = [(stock(template), "generated")]
    sources += [(marked(template), "template")] if name not in TRUTH else []
    for number, left in ((1, stretches[1:]), (3, stretches[:1])):
        chat = [turn | off if i == number else turn for i, turn in enumerate(CHAT)]
        for source, mask in sources:
            found = encoder(hf, source, mask=mask).encode(chat)
            assert found[0] == ids
            said = learned(hf, *found)
            if not left[-1].endswith(eos):  # the encoder's end token, of a turn that is learned
                said[-1] = said[-1].removesuffix(eos)
            assert said == left


def test_weights_that_say_what_holds_anyway_change_nothing(hf):
    chat = [
        t | ({"weight": 1, "train": True} if t["role"] == "assistant" else {"weight": 0})
        for t in CHAT
    ]
    ours = encoder(hf, stock(CHATML))
    assert ours.encode(chat) == ours.encode(CHAT)
    off = [t | {"train": False} for t in CHAT]
    assert sum(ours.encode(off)[1]) == 0
    assert sum(ours.encode_completion(off[:3], off[3:])[1]) == 0


def test_a_last_turn_of_weight_0_without_an_end_does_not_learn_the_end_token(hf):
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ids, mask = encoder(hf, bare).encode([CHAT[0], CHAT[1] | {"weight": 0}])
    assert ids[-1] == hf.eos_token_id
    assert sum(mask) == 0


# Stores that were begun before masks had a rule in the recipe


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


def test_marks_count_in_the_completion_alone(hf):
    ours = encoder(hf, marked(CHATML), mask="template")
    ids, mask = ours.encode_completion(CHAT[:3], CHAT[3:])
    assert learned(hf, ids, mask) == ["It is 4.<|im_end|>"]


def test_completions_that_look_like_json_are_texts(hf):
    ids, mask = encoder(hf, stock(CHATML)).encode_completion(CHAT[:1], "[1, 2]")
    assert learned(hf, ids, mask) == ["[1, 2]<|im_end|>"]


def test_private_characters_in_a_content_do_not_disturb_the_trace(hf):
    chat = [CHAT[0], {"role": "assistant", "content": "\U000f00000,1\U000f0000 \U000f0001"}]
    assert texts(hf, stock(CHATML), chat) == [chat[1]["content"] + "<|im_end|>"]
