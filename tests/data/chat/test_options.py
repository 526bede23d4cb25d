"""Options of chat templates, and the recipe that they are recorded in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.config import load_config
from megadistill.data.chat.encoder import ChatEncoder
from megadistill.data.tokenizer import chat_identity, chat_spec
from megadistill.data.tokens import build_tokens
from megadistill.errors import BadDocumentError, ConfigError, RecipeError
from tests.data.chat.stores import config, decoded
from tests.data.chats import CHAT, CHATML, TEMPLATES, stock
from tests.data.stores import same_store
from tests.data.test_chat_masks import encoder

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
    path = os.pathsep.join([str(tmp_path / "day"), str(Path(__file__).parents[3])])
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
