"""Chat templates, chats and an independent truth for loss masks.

The templates are written for the tests. Each stands for a family, and has the places where a turn's
part opens and closes marked with `<<` and `>>`. Without these it is the template as a model ships
it; with `{% generation %}` in their place transformers itself gives the true mask.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
]

# name: (template, special tokens, end token). Marks stand around assistants' turns alone, so the
# templates branch by role where they mark.
TEMPLATES: dict[str, tuple[str, list[str], str]] = {
    "header and end of turn": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}<<"
        "{{ m.content + '<|im_end|>' }}>>{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    "contents are trimmed": (
        "{{ bos_token }}{% for m in messages %}{% set head = '<|head|>' + m.role + '\n\n' %}"
        "{% if m.role == 'assistant' %}{{ head }}<<{{ m.content | trim + '<|eot|>' }}>>"
        "{% else %}{{ head + m.content | trim + '<|eot|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant\n\n' }}{% endif %}",
        ["<|bos|>", "<|head|>", "<|eot|>", "<|end|>"],
        "<|end|>",
    ),
    "no generation prompt": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'user' %}{{ ' [INST] ' }}"
        "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
        "{{ m.content + ' [/INST]' }}{% else %}<<{{ ' ' + m.content + eos_token }}>>"
        "{% endif %}{% endfor %}",
        ["<|bos|>", "</s>"],
        "</s>",
    ),
    "reasoning of earlier turns is dropped": (
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% set thought, content = '', m.content %}"
        "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
        "{% elif '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>assistant\n' }}<<{% if loop.index0 > ns.last %}"
        "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
        "{{ content + '<|im_end|>' }}>>{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    "tools": (
        "{% if tools %}{{ '<|tools|>' + tools | tojson + '<|eot|>' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}<<"
        "{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
        "{{ '<call>' + call.function.name + call.function.arguments | tojson + '</call>' }}"
        "{% endfor %}{{ '<|eot|>' }}>>{{ '\n' }}"
        "{% elif m.role == 'tool' %}"
        "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|user|>' }}{% endif %}"
        "{{ '<result>' + m.content + '</result>' }}"
        "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|eot|>\n' }}{% endif %}"
        "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|eot|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ["<|tools|>", "<|assistant|>", "<|user|>", "<|system|>", "<|eot|>"],
        "<|eot|>",
    ),
    "an end token in place of the generation prompt": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}<<"
        "{{ m.content + '<|end|>' }}>>{{ '\n' }}{% else %}"
        "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["<|assistant|>", "<|user|>", "<|system|>", "<|end|>", "<|endoftext|>"],
        "<|endoftext|>",
    ),
    "the generation prompt within the loop": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}<<"
        "{{ m.content + eos_token }}>>{% else %}"
        "{{ '<|' + m.role + '|>\n' + m.content + eos_token }}{% endif %}{{ '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        "{% endfor %}",
        ["<|assistant|>", "<|user|>", "<|system|>", "</s>"],
        "</s>",
    ),
    "turns in a macro, some left out": (
        "{% macro turn(m) %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}<<"
        "{{ m.content + '<|eot|>' }}>>{% else %}{{ '<|' + m.role + '|>' + m.content + '<|eot|>' }}"
        "{% endif %}{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ turn(m) }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ["<|assistant|>", "<|user|>", "<|eot|>", "<|endoftext|>"],
        "<|endoftext|>",
    ),
    "a loop over numbers": (
        "{% for i in range(messages | length) %}{% set m = messages[i] %}"
        "{% if m.role == 'assistant' %}{{ '<|assistant|>' }}<<"
        "{% if i == messages | length - 1 %}{{ '<think></think>' }}{% endif %}"
        "{{ m.content + '<|eot|>' }}>>{% else %}{{ '<|' + m.role + '|>' + m.content + '<|eot|>' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ["<|assistant|>", "<|user|>", "<|system|>", "<|eot|>", "<|endoftext|>"],
        "<|endoftext|>",
    ),
    "an end of turn that is no token": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT:' }}<<"
        "{{ ' ' + m.content + ' ###' }}>>{{ '\n' }}{% else %}"
        "{{ m.role | upper + ': ' + m.content + ' ###\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        ["<|endoftext|>"],
        "<|endoftext|>",
    ),
    "the end is printed with the next turn": (
        "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}"
        "{% if messages[loop.index0 - 1].role == 'assistant' %}<<{{ '<|eot|>' }}>>{% else %}"
        "{{ '<|eot|>' }}{% endif %}{% endif %}{{ '<|user|>' + m.content }}"
        "{% elif m.role == 'assistant' %}"
        "{{ '<|assistant|>' }}<<{{ m.content }}>>{% else %}{{ '<|system|>' + m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ["<|assistant|>", "<|user|>", "<|system|>", "<|eot|>", "<|endoftext|>"],
        "<|endoftext|>",
    ),
}


CHATML = TEMPLATES["header and end of turn"][0]
# transformers cannot place marks within a macro: the truth is the same template without it.
TRUTH = {
    "turns in a macro, some left out": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}<<"
        "{{ m.content + '<|eot|>' }}>>{% elif m.role != 'system' %}"
        "{{ '<|' + m.role + '|>' + m.content + '<|eot|>' }}{% endif %}{% endfor %}"
    )
}


def stock(template: str) -> str:
    return template.replace("<<", "").replace(">>", "")


def marked(template: str) -> str:
    return template.replace("<<", "{% generation %}").replace(">>", "{% endgeneration %}")


def byte_tokenizer(
    special: list[str], *, eos: str, bos: str | None = None, merges: Sequence[tuple[str, str]] = ()
) -> Any:
    """Every byte is a token, and every special token; merges may join bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    for one, other in merges:
        vocab.setdefault(one + other, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    bos = bos or ("<|bos|>" if "<|bos|>" in special else None)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)


WORDS = [
    "",
    " ",
    "\n",
    "Yes.",
    "It is 4",
    " two  words ",
    "line\n\nbreak\n",
    "naïve ☃ 日本",
    "a<b>c",
    "  \n leading",
    "trailing \n ",
    "{{ x }}",
    "<think>",
    "0" * 60,
]


def generated_chats(
    seed: int,
    count: int,
    *,
    calls: int = 0,
    system: bool = True,
    reasoning: bool = False,
    alternate: bool = False,
    empty: bool = True,
) -> list[list[dict[str, Any]]]:
    """Chats of several turns, some with a system prompt, calls of tools and reasoning.

    calls: most calls of a turn. alternate: no two turns of the assistant in a row.
    """
    draw = random.Random(seed)

    def text() -> str:
        words = "".join(draw.choices(WORDS, k=draw.randint(0 if empty else 1, 3)))
        return words if empty or words.strip() else "word" + words

    chats = []
    for _ in range(count):
        chat: list[dict[str, Any]] = []
        if system and draw.random() < 0.4:
            chat.append({"role": "system", "content": text()})
        for _ in range(draw.randint(1, 4)):
            chat.append({"role": "user", "content": text()})
            if calls and draw.random() < 0.5:
                chat += _calls(draw, text, calls)
            answers = 1 if alternate else draw.choice([1, 1, 1, 1, 2])
            for _ in range(answers):
                turn = {"role": "assistant", "content": text()}
                if reasoning and draw.random() < 0.5:
                    if draw.random() < 0.5:
                        turn["reasoning_content"] = text()
                    else:
                        turn["content"] = f"<think>\n{text()}\n</think>\n\n{text()}"
                chat.append(turn)
        if draw.random() < 0.2:
            chat.append({"role": "user", "content": text()})
        chats.append(chat)
    return chats


def _calls(draw: random.Random, text: Any, most: int) -> list[dict[str, Any]]:
    results = []
    calls = []
    for number in range(draw.randint(1, most)):
        name = f"call{number:05d}"
        arguments = {"city": text(), "days": draw.randint(1, 9), "more": [None, {"a": True}]}
        function = {"name": draw.choice(["weather", "search"]), "arguments": arguments}
        calls.append({"type": "function", "id": name, "function": function})
        results.append({"role": "tool", "tool_call_id": name, "name": "weather", "content": text()})
    turn = {"role": "assistant", "tool_calls": calls, "content": draw.choice(["", None, text()])}
    return [turn, *results]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "which"}},
                "required": ["city"],
            },
        },
    }
]
