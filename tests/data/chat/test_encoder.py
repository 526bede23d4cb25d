"""Chats on their way to tokens: borders, what is refused, and turns that are not learned."""

import pytest

from megadistill.errors import BadDocumentError
from tests.data.chat.stores import SPECIAL, texts
from tests.data.chats import CHAT, CHATML, TEMPLATES, TOOLS, TRUTH, byte_tokenizer, marked, stock
from tests.data.test_chat_masks import encoder, learned, truth

MERGED = [("Ċ", "Ċ"), ("Ġ", "t")]  # two line breaks, and a space with a t


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
