"""A chat as a corpus holds it, in any of the usual shapes, becomes a list of turns.

A turn is a dict with `role` and, unless it is null, `content`: the form of OpenAI and transformers.

- OpenAI: {"role", "content"}, content as text or a list of text parts, `tool_calls`, the older
  `function_call`, `tool_call_id`, `name`.
- ShareGPT: {"from", "value"} with human, gpt, system, tool, function_call, observation.
- Reasoning under `reasoning_content`, `thinking` or `reasoning`: all three names are filled, since
  templates read different ones.
- All of it as JSON text, turn by turn or as a whole, inside {"messages": [...]} or
  {"conversations": [...]}, or as a dict of lists (`datasets.Sequence` of a dict).

Arguments of tool calls become objects where they are JSON text: transformers' convention, which
templates print with `tojson`. Results of tools that are objects become JSON text. Keys at null are
left out; `content` at null is the same as no content.

`weight: 0` (OpenAI) and `train: false` (axolotl) leave a turn of the assistant unlearned. Such a
turn has `weight: 0`; no other turn has either key.
"""

from __future__ import annotations

import json
from typing import Any

from megadistill.errors import BadDocumentError

Turn = dict[str, Any]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
}
_CALLS = ("function_call", "tool_call")
_LISTS = ("messages", "conversations", "conversation")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_LEARNING = ("weight", "train", "train_detail")
_TEXT_PARTS = ("text", "input_text", "output_text")


def conversation(value: Any, *, first: int = 0) -> list[Turn]:
    """The turns of a chat; none for null and for an empty list.

    first: the number of the first turn, for messages. Raises BadDocumentError, which names the
    turn, counted from 0 as in the file.
    """
    value = _parsed(value, "a chat")
    if isinstance(value, dict):
        value = _unwrapped(value)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadDocumentError(f"expected a list of turns, found {_found(value)}")
    return [_turn(turn, f"turn {number}") for number, turn in enumerate(value, first)]


def tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a chat as JSON schemas; None without any. Raises BadDocumentError."""
    if isinstance(value, str) and not value.strip():
        return None
    value = _parsed(value, "tools")
    if isinstance(value, dict):
        value = [value]
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise BadDocumentError(f"expected a list of tools, found {_found(value)}")
    found = []
    for number, tool in enumerate(value):
        tool = _parsed(tool, f"tool {number}")
        if not isinstance(tool, dict):
            raise BadDocumentError(f"tool {number}: expected a JSON schema, found {_found(tool)}")
        tool = {k: v for k, v in tool.items() if v is not None}
        flat = "function" not in tool and "name" in tool
        found.append({"type": "function", "function": tool} if flat else tool)
    return found


def _unwrapped(value: dict[str, Any]) -> Any:
    for key in _LISTS:
        if value.get(key) is not None:
            return _parsed(value[key], "a chat")
    lists = {k: v for k, v in value.items() if v is not None}
    columns = list(lists.values())
    if not all(isinstance(v, list) for v in columns) or len({len(v) for v in columns}) != 1:
        return value
    return [dict(zip(lists, values, strict=True)) for values in zip(*columns, strict=True)]


def _turn(value: Any, where: str) -> Turn:
    value = _parsed(value, where, found="expected an object with role and content")
    if not isinstance(value, dict):
        raise BadDocumentError(
            f"{where}: expected an object with role and content, found {_found(value)}"
        )
    turn = {k: v for k, v in value.items() if v is not None or k == "content"}
    key = next((k for k in ("role", "from") if isinstance(turn.get(k), str)), None)
    if key is None:
        raise BadDocumentError(
            f"{where}: expected the keys role and content (or from and value), found "
            f"{', '.join(map(str, turn)) or 'none'}"
        )
    name = turn[key].strip().lower()
    if key == "from" and name not in _ROLES:
        raise BadDocumentError(
            f"{where}: from is {turn[key]!r}, expected one of {', '.join(_ROLES)}"
        )
    role = _ROLES.get(name, turn[key])
    text = next((k for k in ("content", "value", "text") if turn.get(k) is not None), None)
    # A null `value` is no key any more in parquet.
    stated = text is not None or key == "from" or any(k in value for k in ("content", "value"))
    content = None if text is None else turn[text]
    known = (key, text, "role", "content", "from", *_LEARNING)
    rest = {k: v for k, v in turn.items() if k not in known}
    result: Turn = {"role": role}
    if not _is_learned(turn, role, where):
        result["weight"] = 0
    if name in _CALLS:
        rest["tool_calls"], content = _parsed(content, f"{where}: {key} {name}"), None
    if "function_call" in rest:
        rest["tool_calls"] = rest.pop("function_call")
    content = _content(content, role, where)
    if content is not None:
        result["content"] = content
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(rest["tool_calls"], where)
        if not rest["tool_calls"]:
            del rest["tool_calls"]
    reasoning = next((rest[k] for k in _REASONING if isinstance(rest.get(k), str)), None)
    if reasoning is not None:
        rest = {"thinking": reasoning, **rest, "reasoning_content": reasoning}
    if not stated and not ({"tool_calls", *_REASONING} & set(rest)):
        raise BadDocumentError(
            f"{where}: has neither content nor tool_calls; its keys are {', '.join(turn)}"
        )
    return result | rest


def _is_learned(turn: Turn, role: str, where: str) -> bool:
    """Returns a turn's `weight` or `train` as bool. True for an assistant's turn without either."""
    if "train_detail" in turn:
        raise BadDocumentError(
            f"{where}: train_detail marks parts of a turn, expected weight or train, which hold "
            "for the whole turn: leave train_detail out"
        )
    said = {}
    if "weight" in turn:
        said["weight"] = _one_of(turn["weight"], {0: False, 1: True}, f"{where}: weight", "0 or 1")
    if "train" in turn:
        values = {False: False, True: True}
        said["train"] = _one_of(turn["train"], values, f"{where}: train", "true or false")
    if len(set(said.values())) > 1:
        raise BadDocumentError(f"{where}: weight and train contradict each other: leave one out")
    key = next((key for key, learn in said.items() if learn), None)
    if key is not None and role != "assistant":
        raise BadDocumentError(
            f"{where}: {key} asks to learn a turn of the role {role!r}, expected one of the "
            f"assistant: only its turns are learned: leave {key} out"
        )
    return all(said.values())


def _one_of(value: Any, values: dict[Any, bool], where: str, expected: str) -> bool:
    """values[value]; numbers and truth values are not taken for each other."""
    truth = isinstance(next(iter(values)), bool)
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool) != truth
        or value not in values
    ):
        raise BadDocumentError(f"{where}: expected {expected}, found {_found(value)}")
    return values[value]


def _content(value: Any, role: str, where: str) -> Any:
    """Text, a list of text parts, or None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(_is_part(part) for part in value):
        return [_part(part, f"{where}: part {n}") for n, part in enumerate(value)]
    if role == "tool" and isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict) and _is_part(value):
        return [_part(value, where)]
    raise BadDocumentError(f"{where}: expected text as content, found {_found(value)}")


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("type"), str))


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if part["type"] in _TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise BadDocumentError(
        f"{where}: is of type {part['type']!r}: only text parts can be learned from"
    )


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    value = _parsed(value, f"{where}: tool_calls")
    calls = []
    for number, call in enumerate(value if isinstance(value, list) else [value]):
        place = f"{where}: tool call {number}"
        call = _parsed(call, place)
        if not isinstance(call, dict):
            raise BadDocumentError(f"{place}: expected an object, found {_found(call)}")
        call = {k: v for k, v in call.items() if v is not None}
        if "function" not in call:
            names = ("name", "arguments", "parameters")
            function = {k: call.pop(k) for k in names if k in call}
        else:
            function = _parsed(call["function"], place)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadDocumentError(
                f"{place}: expected a function with name and arguments, found "
                f"{_found(function or call)}"
            )
        function = dict(function)
        arguments = function.pop("arguments", None)
        if arguments is None:
            arguments = function.pop("parameters", None)
        function["arguments"] = _arguments(arguments, place)
        calls.append({"type": "function", **call, "function": function})
    return calls


def _arguments(value: Any, where: str) -> dict[str, Any]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    value = _parsed(value, f"{where}: arguments")
    if not isinstance(value, dict):
        raise BadDocumentError(f"{where}: expected an object of arguments, found {_found(value)}")
    return value


def _parsed(value: Any, where: str, *, found: str = "") -> Any:
    """The value, decoded if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        decoded = json.loads(value)
        if "\\ud" in value.lower():
            json.dumps(decoded, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadDocumentError(
            f"{where}: holds half of a surrogate pair, which is no text"
        ) from error
    except (ValueError, RecursionError) as error:
        expected = found or "expected JSON"
        raise BadDocumentError(f"{where}: {expected}, found the text {_short(value)}") from error
    return decoded


def _found(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {_short(value)}"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(str, value)) or 'none'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return type(value).__name__


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
