"""A chat template, rendered in transformers' sandbox and traced message by message.

A trace tells which characters of the rendered text each message produced. The template is parsed
to jinja's syntax tree and every `for` body gets one more output: a mark if the loop's target is one
of the messages, nothing otherwise. Marks pass through macros, `set` blocks and `call` blocks like
any text and are cut out again. The text without marks must equal the text of the untouched
template, so a template that measures or trims what it has printed is noticed and not traced.

Why not search for the contents in the text: templates trim, split and drop them, and an empty
content has no place. Why not render shorter chats alone: templates print earlier turns differently
as a chat grows (reasoning that is dropped, tools before the last question).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# The marks' characters, from plane 15's private use. The first one that the text lacks is taken.
_PRIVATE = range(0xF0000, 0xF0100)
_NO_MESSAGE = -1
_NAME = "megadistill_trace"
_PROBE = "The quick brown fox"  # a content without white space at its edges or special tokens

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None


# Filters and functions of jinja that give another text each time.
RANDOM = frozenset({"random", "lipsum"})


def template_names(source: str) -> set[str]:
    """The variables and filters that a template uses. ValueError: it cannot be parsed."""
    from jinja2 import TemplateSyntaxError, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template(source).environment.parse(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error
    return {found.name for found in tree.find_all((nodes.Name, nodes.Filter))}


def has_marks(source: str) -> bool:
    """Whether a template marks what is generated, with {% generation %}."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


class TemplateError(Exception):
    """The template refuses a chat. The message is the template's own."""


@dataclass(frozen=True)
class Span:
    """Characters [begin, end) that an iteration over message `message` printed."""

    message: int
    begin: int
    end: int


@dataclass(frozen=True)
class Trace:
    """A rendered chat. `spans` has an entry for every iteration, in order of `begin`.

    Spans of nested loops lie inside those of the outer loop.
    """

    text: str
    spans: list[Span]


class ChatTemplate:
    """Chat template with everything but the chat: its variables and its date.

    variables: names that the template sees, such as bos_token or enable_thinking.
    date: the ISO date that `strftime_now` gives.
    """

    def __init__(self, source: str, *, variables: Mapping[str, Any], date: str) -> None:
        self.source = source
        day = datetime.datetime.fromisoformat(date)
        self.variables = dict(variables) | {"strftime_now": day.strftime}

    def render(self, messages: Messages, tools: Tools = None, *, generation: bool = False) -> str:
        """The chat as text, with the generation prompt if `generation`. Raises TemplateError."""
        return "".join(self.chunks(messages, tools, generation=generation))

    def chunks(
        self, messages: Messages, tools: Tools = None, *, generation: bool = False
    ) -> list[str]:
        """`render`, in the pieces that the template prints."""
        return self._run(self._plain, messages, tools, generation=generation)

    def trace(self, messages: Messages, tools: Tools = None) -> Trace:
        """The chat as text with what each message printed.

        Raises TemplateError. Without spans if the template cannot be traced.
        """
        text = self.render(messages, tools)
        mark = next((chr(code) for code in _PRIVATE if chr(code) not in text), None)
        if mark is None:
            return Trace(text, [])
        marker = _Marker(mark, messages)
        try:
            marked = "".join(
                self._run(self._traced, messages, tools, generation=False, **{_NAME: marker})
            )
        except TemplateError:
            return Trace(text, [])
        trace = _read_marks(marked, mark)
        return trace if trace.text == text else Trace(text, [])

    def marked(self, messages: Messages, tools: Tools = None) -> tuple[str, list[tuple[int, int]]]:
        """The chat as text, and its {% generation %} blocks in characters."""
        from transformers.utils import chat_template_utils

        try:
            return chat_template_utils._render_with_assistant_indices(
                compiled_template=self._plain,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=False,
                **self.variables,
            )
        except Exception as error:  # templates raise whatever Python does
            raise _refusal(error) from error

    @cached_property
    def takes_text(self) -> bool:
        """Whether a content may be a text. Some templates print lists of parts alone."""
        return not self._prints_parts or self._probe(_PROBE) is not None

    @cached_property
    def takes_parts(self) -> bool:
        """Whether a content may be a list of text parts."""
        if not self._prints_parts:
            return False
        text = self._probe(_PROBE)
        return text is None or text == self._probe([{"type": "text", "text": _PROBE}])

    @cached_property
    def _prints_parts(self) -> bool:
        found = self._probe([{"type": "text", "text": _PROBE}])
        return found is not None and "'type'" not in found and '"type"' not in found

    def _probe(self, content: Any) -> str | None:
        """A chat of two turns with that content; None if it does not come out."""
        chat = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            text = self.render(chat)
        except TemplateError:
            return None
        return text if text.count(_PROBE) >= len(chat) else None

    def _run(
        self, template: Any, messages: Messages, tools: Tools, *, generation: bool, **more: Any
    ) -> list[str]:
        try:
            return list(
                template.generate(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=generation,
                    **self.variables,
                    **more,
                )
            )
        except Exception as error:  # templates raise whatever Python does
            raise _refusal(error) from error

    @cached_property
    def _plain(self) -> Any:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        return _compile_jinja_template(self.source)

    @cached_property
    def _traced(self) -> Any:
        from jinja2 import Template

        environment = self._plain.environment
        tree = _instrument(environment.parse(self.source))
        code = environment.compile(tree)
        return Template.from_code(environment, code, environment.make_globals(None))


def _refusal(error: Exception) -> TemplateError:
    lines = str(error).strip().splitlines()
    return TemplateError(lines[0] if lines else type(error).__name__)


class _Marker:
    """Called by the instrumented template. Returns the mark to print, or nothing."""

    def __init__(self, mark: str, messages: Messages) -> None:
        self._mark = mark
        self._number = {id(message): i for i, message in enumerate(messages)}
        self._inside: set[int] = set()  # loops whose current iteration is marked

    def enter(self, loop: int, *targets: Any) -> str:
        """At the start of an iteration of `loop` over `targets`."""
        numbers = [self._number[id(t)] for t in targets if id(t) in self._number]
        if len(numbers) == 1:
            self._inside.add(loop)
            return self._print(loop, numbers[0])
        return self.leave(loop)

    def assigned(self, loop: int, value: Any) -> str:
        """After `set x = value` in the body of `loop`: loops over indices pick messages so."""
        if loop in self._inside or id(value) not in self._number:
            return ""
        return self.enter(loop, value)

    def leave(self, loop: int) -> str:
        """After the last iteration of `loop`, and before one over something else."""
        if loop not in self._inside:
            return ""
        self._inside.remove(loop)
        return self._print(loop, _NO_MESSAGE)

    def _print(self, loop: int, number: int) -> str:
        return f"{self._mark}{loop},{number}{self._mark}"


def _instrument(tree: Any) -> Any:
    from jinja2 import nodes

    loops = list(tree.find_all(nodes.For))
    for number, loop in enumerate(loops):
        one = isinstance(loop.target, nodes.Name)
        targets = [loop.target] if one else loop.target.find_all(nodes.Name)
        names = [nodes.Name(t.name, "load") for t in targets]
        _mark_assignments(loop.body, number)
        loop.body.insert(0, _call("enter", nodes.Const(number), *names))
    _after_loops(tree, {id(loop): number for number, loop in enumerate(loops)})
    return tree.set_environment(tree.environment)


def _call(method: str, *arguments: Any) -> Any:
    from jinja2 import nodes

    function = nodes.Getattr(nodes.Name(_NAME, "load"), method, "load")
    return nodes.Output([nodes.Call(function, list(arguments), [], None, None)])


def _bodies(node: Any) -> list[list[Any]]:
    """The lists of statements directly below a node."""
    fields = ("body", "else_", "elif_")
    return [v for f in fields if isinstance(v := getattr(node, f, None), list)]


def _after_loops(node: Any, numbers: dict[int, int]) -> None:
    """Put a `leave` behind each loop: `break` and `continue` do not reach the end of its body."""
    from jinja2 import nodes

    for body in _bodies(node):
        for child in list(body):
            _after_loops(child, numbers)
            if isinstance(child, nodes.For):
                at = next(i for i, other in enumerate(body) if other is child)
                body.insert(at + 1, _call("leave", nodes.Const(numbers[id(child)])))


def _mark_assignments(body: list[Any], loop: int) -> None:
    """Report what `set` assigns in the body of a loop, not in loops within."""
    from jinja2 import nodes

    for child in list(body):
        if isinstance(child, nodes.Assign) and isinstance(child.target, nodes.Name):
            at = next(i for i, other in enumerate(body) if other is child)
            name = nodes.Name(child.target.name, "load")
            body.insert(at + 1, _call("assigned", nodes.Const(loop), name))
        elif not isinstance(child, nodes.For | nodes.Macro):
            for inner in _bodies(child):
                _mark_assignments(inner, loop)


def _read_marks(marked: str, mark: str) -> Trace:
    """The text without its marks, and the spans that they say."""
    parts = re.split(f"{mark}(\\d+),(-?\\d+){mark}", marked)
    text, at = [parts[0]], len(parts[0])
    spans: list[Span] = []
    inside: list[tuple[str, int, int]] = []  # loop, message, begin
    for loop, number, following in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        loops = [other for other, _, _ in inside]
        if loop in loops:
            first = loops.index(loop)
            spans += [Span(message, begin, at) for _, message, begin in inside[first:]]
            del inside[first:]
        if int(number) != _NO_MESSAGE:
            inside.append((loop, int(number), at))
        text.append(following)
        at += len(following)
    spans += [Span(message, begin, at) for _, message, begin in inside]
    return Trace("".join(text), sorted(spans, key=lambda s: (s.begin, -s.end)))
