"""The shapes in which corpora hold chats, and what is said of those that cannot be used."""

import json

import pytest

from megadistill.data.conversation import conversation, tools
from megadistill.errors import BadDocumentError

CALL = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"a": 1}}}
PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "value",
    [
        PLAIN,
        [{"role": "user", "content": "Hi", "name": None, "tool_calls": None}, PLAIN[1]],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        [{"role": "Human", "content": "Hi"}, {"role": "GPT", "content": "Hello"}],
        [{"role": None, "content": None, "from": "human", "value": "Hi"}, PLAIN[1]],
        json.dumps(PLAIN),
        [json.dumps(turn) for turn in PLAIN],
        {"messages": PLAIN},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"role": ["user", "assistant"], "content": ["Hi", "Hello"]},
    ],
)
def test_a_chat_in_any_shape_becomes_turns_with_role_and_content(value):
    assert conversation(value) == PLAIN


@pytest.mark.parametrize("value", [None, [], "[]", {"messages": []}])
def test_a_chat_without_turns_is_an_empty_document(value):
    assert conversation(value) == []


@pytest.mark.parametrize("content", ["", " \n", "  x  "])
def test_contents_stay_as_they_are(content):
    assert conversation([{"role": "user", "content": content}])[0]["content"] == content


def test_a_content_of_text_parts_stays_a_list_of_parts():
    parts = [{"type": "text", "text": "a", "image_url": None}, "b"]
    (turn,) = conversation([{"role": "user", "content": parts}])
    assert turn["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
            ],
        },
        {"role": "assistant", "tool_calls": [{"id": "c1", "name": "f", "arguments": {"a": 1}}]},
    ],
)
def test_calls_of_tools_have_arguments_as_objects(turn):
    assert conversation([turn]) == [{"role": "assistant", "tool_calls": [CALL]}]


def test_sharegpt_calls_and_observations_become_calls_and_results():
    found = conversation(
        [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ]
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert [turn["role"] for turn in found] == ["user", "assistant", "tool", "assistant"]
    assert found[1] == {"role": "assistant", "tool_calls": [call]}
    assert found[2]["content"] == "sunny"


def test_the_older_function_call_of_openai_is_a_call():
    turns = [
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "f", "arguments": '{"a": 1}'},
        },
        {"role": "function", "name": "f", "content": "4"},
    ]
    call, result = conversation(turns)
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert result == {"role": "tool", "name": "f", "content": "4"}


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_there_under_the_names_that_templates_read(key):
    (turn,) = conversation([{"role": "assistant", "content": "4", key: "2 + 2"}])
    assert turn["reasoning_content"] == turn["thinking"] == "2 + 2"


def test_a_tools_result_that_is_an_object_becomes_json():
    (turn,) = conversation([{"role": "tool", "content": {"city": "Zürich", "none": None}}])
    assert turn["content"] == '{"city": "Zürich", "none": null}'


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["Hi", "Hello"], "turn 0: expected an object with role and content, found the text 'Hi'"),
        ([*PLAIN, 7], "turn 2: expected an object with role and content, found the number 7"),
        ([*PLAIN, None], "turn 2: expected an object with role and content, found null"),
        (
            [*PLAIN, {"content": "x"}],
            "turn 2: expected the keys role and content (or from and value), found content",
        ),
        (
            [*PLAIN, {"speaker": "A", "text": "x"}],
            "turn 2: expected the keys role and content (or from and value), found speaker, text",
        ),
        (
            [*PLAIN, {"from": "narrator", "value": "x"}],
            "turn 2: from is 'narrator', expected one of human",
        ),
        (
            [*PLAIN, {"role": "user", "content": 42}],
            "turn 2: expected text as content, found the number 42",
        ),
        (
            [*PLAIN, {"role": "user", "content": {"a": 1}}],
            "turn 2: expected text as content, found an object with the keys a",
        ),
        (
            [*PLAIN, {"role": "user", "content": [1, 2]}],
            "turn 2: expected text as content, found a list of 2",
        ),
        (
            [
                *PLAIN,
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "image_url", "image_url": "x"},
                    ],
                },
            ],
            "turn 2: part 1: is of type 'image_url': only text parts can be learned from",
        ),
        (
            [*PLAIN, {"role": "assistant", "mood": "good"}],
            "turn 2: has neither content nor tool_calls; its keys are role, mood",
        ),
        (
            [*PLAIN, {"role": "assistant", "tool_calls": [{"id": "x"}]}],
            "turn 2: tool call 0: expected "
            "a function with name and arguments, found an object with the keys id",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "no"}}]}],
            "turn 0: tool call 0: arguments: expected JSON, found the text 'no'",
        ),
        (
            [{"role": "assistant", "content": "x", "weight": 0.5}],
            "turn 0: weight: expected 0 or 1, found the number 0.5",
        ),
        (
            [{"role": "assistant", "content": "x", "weight": "0"}],
            "turn 0: weight: expected 0 or 1, found the text '0'",
        ),
        (
            [{"role": "assistant", "content": "x", "weight": False}],
            "turn 0: weight: expected 0 or 1, found the truth value false",
        ),
        (
            [{"from": "gpt", "value": "x", "train": 0}],
            "turn 0: train: expected true or false, found the number 0",
        ),
        (
            [{"from": "gpt", "value": "x", "train": []}],
            "turn 0: train: expected true or false, found a list of 0",
        ),
        (
            [*PLAIN, {"role": "user", "content": "x", "weight": 1}],
            "turn 2: weight asks to learn a turn of the role 'user', expected one of the assistant",
        ),
        (
            [{"role": "assistant", "content": "x", "weight": 0, "train": True}],
            "turn 0: weight and train contradict each other",
        ),
        (
            [{"role": "assistant", "content": "x", "train_detail": [{"train": False}]}],
            "turn 0: train_detail marks parts of a turn",
        ),
        ("Hi there", "a chat: expected JSON, found the text 'Hi there'"),
        (17, "expected a list of turns, found the number 17"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_turn(value, said):
    with pytest.raises(BadDocumentError) as refused:
        conversation(value)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "x", "weight": 0},
        {"from": "gpt", "value": "x", "train": False, "weight": None},
    ],
)
def test_a_turn_that_is_not_learned_has_weight_0_however_its_corpus_says_it(turn):
    assert conversation([turn]) == [{"role": "assistant", "weight": 0, "content": "x"}]


SCHEMA = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    "value",
    [
        [{"type": "function", "function": SCHEMA}],
        json.dumps([{"type": "function", "function": SCHEMA}]),
        [json.dumps(SCHEMA)],
        [SCHEMA],
        SCHEMA,
    ],
)
def test_tools_in_any_shape_become_schemas(value):
    assert tools(value) == [{"type": "function", "function": SCHEMA}]


@pytest.mark.parametrize("value", [None, [], "[]", "", "null"])
def test_no_tools_are_none(value):
    assert tools(value) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("weather", "tools: expected JSON, found the text 'weather'"),
        (["weather"], "tool 0: expected JSON, found the text 'weather'"),
        ([SCHEMA, 3], "tool 1: expected a JSON schema, found the number 3"),
        (3, "expected a list of tools, found the number 3"),
    ],
)
def test_what_are_no_tools_is_refused(value, said):
    with pytest.raises(BadDocumentError, match=said):
        tools(value)
