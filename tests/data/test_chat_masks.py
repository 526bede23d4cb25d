"""The loss mask of chats is what the model would generate, under templates without marks.

The truth is transformers' own mask of the same template with {% generation %} marks put in by hand.
"""

import json

import pytest

from megadistill.data.chat.encoder import ChatEncoder, ChatSpec
from megadistill.errors import BadDocumentError
from tests.data.chats import (
    CHAT,
    TEMPLATES,
    TOOLS,
    TRUTH,
    byte_tokenizer,
    generated_chats,
    marked,
    stock,
)


def encoder(hf, template, *, mask="generated", date="2024-07-26", **variables):
    tokens = {k: v for k, v in hf.special_tokens_map.items() if isinstance(v, str)}
    spec = ChatSpec({"default": template}, tokens | variables, date, mask)
    return ChatEncoder(spec, backend=hf.backend_tokenizer.to_str(), eos=hf.eos_token_id)


def truth(hf, template, chat, tools=None, **variables):
    """(ids, mask) by transformers, with the end token where the text has none."""
    found = hf.apply_chat_template(
        chat,
        chat_template=template,
        tools=tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **variables,
    )
    ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
    if not hf.decode(ids).rstrip().endswith(hf.eos_token):
        ids, mask = [*ids, hf.eos_token_id], [*mask, 0]
    return ids, mask


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


def chats_for(name):
    late = name == "the end is printed with the next turn"
    chats = generated_chats(
        len(name),
        40,
        calls=2 * (name == "tools"),
        reasoning="reasoning" in name,
        alternate=late or name == "no generation prompt",
    )
    if late:  # transformers leaves out the last bytes of a letter at the end of a mark
        for turn in (turn for chat in chats for turn in chat):
            turn["content"] = turn["content"].encode("ascii", "ignore").decode()
    return chats


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_is_that_of_marks_put_in_by_hand(name):
    template, special, eos = TEMPLATES[name]
    hf = byte_tokenizer(special, eos=eos)
    ours = encoder(hf, stock(template))
    tools = TOOLS if name == "tools" else None
    for chat in chats_for(name):
        ids, mask = truth(hf, marked(TRUTH.get(name, template)), chat, tools)
        if name == "the end is printed with the next turn" and chat[-1]["role"] == "assistant":
            mask[-1] = 1  # the last turn has no end of its own
        assert ours.encode(chat, tools) == (ids, mask), chat
        text = hf.apply_chat_template(
            chat, chat_template=stock(template), tools=tools, tokenize=False
        )
        assert hf.decode(ids).removesuffix(hf.eos_token) == text.removesuffix(hf.eos_token)


def test_a_null_content_is_never_learned_as_a_word():
    head = "{{ '<|im_start|>' + m.role + '\n' }}"
    body = "{% set c = m['content'] %}{% if c is not string %}{% set c = c | tojson %}{% endif %}"
    loop = "{% for m in messages %}" + head + body + "{{ c + '<|im_end|>\n' }}{% endfor %}"
    hf = byte_tokenizer(["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    for content in (body, "{% set c = m.content | string %}", body.replace("['content']", ".a")):
        ours = encoder(hf, loop.replace(body, content.replace(".a", ".get('content')")) + prompt)
        chat = [{"role": "user", "content": "null?"}, {"role": "assistant", "content": None}]
        assert learned(hf, *ours.encode(chat)) == ["<|im_end|>"]
        assert ours.encode(chat) == ours.encode([chat[0], chat[1] | {"content": ""}])


def test_the_header_of_the_assistants_next_turn_ends_no_turn():
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    hf = byte_tokenizer(["<|user|>", "<|assistant|>", "</s>"], eos="</s>")
    ours = encoder(hf, template)
    assert learned(hf, *ours.encode(CHAT)) == ["It is 2.<|user|>", "It is 4.</s>"]
    with pytest.raises(BadDocumentError, match=r"turn 1: .*before the assistant's next turn"):
        ours.encode([*CHAT[:2], CHAT[1]])
    # A template may print the end of a turn with the next one, whose header is another token.
    end = "{% if not loop.first %}{{ '<|eot|>' }}{% endif %}{{ '<|' + m.role"
    hf = byte_tokenizer(["<|user|>", "<|assistant|>", "<|eot|>", "</s>"], eos="</s>")
    ours = encoder(hf, template.replace("{{ '<|' + m.role", end))
    chat = [*CHAT[:2], CHAT[1]]
    assert learned(hf, *ours.encode(chat)) == ["It is 2.<|eot|>", "It is 2.</s>"]


def test_texts_that_look_like_json_are_prompts_and_completions():
    hf = byte_tokenizer(["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    ours = encoder(hf, stock(TEMPLATES["header and end of turn"][0]))
    for prompt, text in (("[INST] hi", "a"), ('{"a": 1} mend it', '{"x": 1}'), ([], "[1, 2]")):
        ids, mask = ours.encode_completion(prompt, text, "")
        assert learned(hf, ids, mask) == [text + "<|im_end|>"]
        assert str(prompt or "") in hf.decode(ids)


def test_half_a_surrogate_pair_within_json_text_is_refused():
    hf = byte_tokenizer(["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    ours = encoder(hf, stock(TEMPLATES["header and end of turn"][0]))
    with pytest.raises(BadDocumentError, match="half of a surrogate pair"):
        ours.encode(json.dumps([{"role": "user", "content": "\ud83d"}]))
    pair = json.dumps([{"role": "user", "content": "\U0001f600"}])
    assert "\U0001f600" in hf.decode(ours.encode(pair)[0])


def test_the_roles_human_and_ai_are_the_users_and_the_assistants():
    hf = byte_tokenizer(["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    ours = encoder(hf, stock(TEMPLATES["header and end of turn"][0]))
    chat = [{"role": "human", "content": "q"}, {"role": "ai", "content": "a"}]
    assert learned(hf, *ours.encode(chat)) == ["a<|im_end|>"]
