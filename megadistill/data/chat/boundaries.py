"""Which characters of a chat the model would generate: one opening and one closing each turn.

A turn opens where the generation prompt ends and closes behind its end-of-turn token. Between them
lie reasoning, content and tool calls as the template prints them at that place of the chat.

Opening. The template renders the chat before the turn with and without `add_generation_prompt`.
If the whole chat begins with the former, the turn opens there: the model was given exactly that.
Otherwise (reasoning dropped from earlier turns, tools printed before the last question) the
generation prompt is what the option adds, and it is found at the start of what the trace says the
turn printed. A prompt that an earlier turn lacks in part, such as the empty `<think>` block of
`enable_thinking=false`, counts as far as both agree, in whole printed pieces or, within the first
piece, whole special tokens and lines.

Closing. Behind the turn's last special token if only white space follows it. Otherwise behind the
text that ends a probe's turn (a template whose end-of-turn is no token of this tokenizer), or
behind the special token that follows the turn directly (templates that print the end with the next
turn; models such as GLM 4 stop by the next turn's header). The chat's last turn may lack one: the
caller appends the tokenizer's end token. Anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate

from megadistill.data.chat.places import places_of
from megadistill.data.chat.template import ChatTemplate, Messages, Span, TemplateError, Tools, Trace
from megadistill.data.chat.texts import any_of, common_length, letters, map_text, swap, texts_in

_PROBE = "The quick brown fox"
_MARK_IT = (
    "mark the assistant's part in the template with {% generation %} ... {% endgeneration %} and "
    "set data.assistant_mask=template"
)


class ChatError(ValueError):
    """A chat that cannot be used because of turn number `turn`."""

    def __init__(self, turn: int, reason: str) -> None:
        super().__init__(reason)
        self.turn = turn


@dataclass(frozen=True)
class Chat:
    """A rendered chat and the characters that are learned.

    unclosed: the last span reaches to the end of the text without an end-of-turn token.
    """

    text: str
    learned: list[tuple[int, int]]
    unclosed: bool = False


class Boundaries:
    """Finds what is learned of the chats of one template and tokenizer.

    special: contents of the tokenizer's special tokens, the end token with them.
    """

    def __init__(self, template: ChatTemplate, special: Collection[str]) -> None:
        self.template = template
        self.special = any_of(special)
        self._probe_end: str | None = None

    def find(
        self, messages: Messages, tools: Tools, *, first: int = 0, unlearned: Collection[int] = ()
    ) -> Chat:
        """The learned part of a chat: its assistant's turns from number `first` on.

        unlearned: numbers of turns that are not learned. Raises ChatError, and TemplateError for a
        chat that the template refuses.
        """
        trace = self.template.trace(messages, tools)
        turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        places = places_of(trace)
        if any(i not in places for i in range(len(messages))):
            self._check_owners(messages, tools, trace, places)
        bare = self._without_special(messages, tools, trace)
        others = [s.begin for i, s in places.items() if s and messages[i]["role"] != "assistant"]
        learned: list[tuple[int, int]] = []
        unclosed = False
        for i in turns:
            span = places.get(i) or self._by_prefixes(messages, tools, trace.text, i)
            before = learned[-1][1] if learned else 0
            opening = self._opening(messages, tools, trace.text, bare, span, others)
            if before > span.begin and before >= opening:  # this turn's header ended the one before
                raise ChatError(
                    turns[len(learned) - 1],
                    f"the chat template prints no end-of-turn token before the assistant's next "
                    f"turn: join the two turns, or {_MARK_IT}",
                )
            closing = self._closing(bare, opening, span.end)
            if closing is None and not trace.text[span.end :].strip():
                closing, unclosed = len(trace.text), True
            if closing is None:
                raise ChatError(
                    i,
                    f"the chat template prints no end-of-turn token behind it: end an "
                    f"assistant's turn with a special token of the tokenizer, or {_MARK_IT}",
                )
            if not before <= opening <= closing or (opening == closing and not unclosed):
                raise ChatError(
                    i,
                    f"begins before the turn before it has ended in the template's text: "
                    f"{_MARK_IT}",
                )
            learned.append((opening, closing))
        kept = [span for i, span in zip(turns, learned, strict=True) if i not in unlearned]
        return Chat(trace.text, kept, unclosed and turns[-1] not in unlearned)

    def without(
        self,
        spans: list[tuple[int, int]],
        messages: Messages,
        tools: Tools,
        unlearned: Collection[int],
    ) -> list[tuple[int, int]]:
        """The marks `spans` of the template but for those of the turns `unlearned`.

        A turn's marks begin between its own text and that of the assistant's next turn. Raises
        ChatError where a turn's place is unknown.
        """
        if not unlearned:
            return spans
        trace = self.template.trace(messages, tools)
        places = places_of(trace)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        begins = [
            (places.get(i) or self._by_prefixes(messages, tools, trace.text, i)).begin
            for i in turns
        ]
        ends = [*begins[1:], len(trace.text)] if turns else []
        left_out = [
            (begin, end)
            for i, begin, end in zip(turns, begins, ends, strict=True)
            if i in unlearned
        ]
        return [s for s in spans if not any(begin <= s[0] < end for begin, end in left_out)]

    def refused_turn(self, messages: Messages, tools: Tools) -> int:
        """The turn behind the longest beginning of the chat that the template prints."""
        lengths = range(len(messages) - 1, 0, -1)
        return next((n for n in lengths if self._try(messages[:n], tools) is not None), 0)

    def begin(self, messages: Messages, tools: Tools, turn: int) -> int:
        """Where the text of a turn and of those after it begins."""
        trace = self.template.trace(messages, tools)
        span = places_of(trace).get(turn)
        before = self._try(messages[:turn], tools) or ""
        return common_length(trace.text, before) if span is None else span.begin

    # The turn's place

    def _by_prefixes(self, messages: Messages, tools: Tools, text: str, i: int) -> Span:
        """The place of a turn without a trace: between shorter chats that begin the same way."""
        prompt = self._try(messages[:i], tools, generation=True)
        through = self._try(messages[: i + 1], tools)
        if prompt is not None and text.startswith(prompt) and through is not None:
            end = common_length(text, through)
            for found in self.special.finditer(through):
                if found.start() < end < found.end():
                    end = found.start()
            rest = self.special.sub("", through[end:])
            if not rest.strip() and end > len(prompt):
                return Span(i, len(prompt), end)
        raise ChatError(
            i,
            f"the chat template prints nothing for it, or prints it so that its part of "
            f"the text is unknown: leave the turn out, or {_MARK_IT}",
        )

    def _check_owners(
        self, messages: Messages, tools: Tools, trace: Trace, places: dict[int, Span | None]
    ) -> None:
        """Refuse text of other turns inside an assistant's.

        A template may print a turn outside an iteration over it (tool results inside the call that
        they answer). Other letters in such turns must leave the assistants' text as it is.
        """
        roles = [m["role"] for m in messages]
        after = roles.index("assistant") if "assistant" in roles else len(roles)
        lost = {i for i in range(after, len(roles)) if i not in places and roles[i] != "assistant"}
        if not lost:
            return
        other = [map_text(m, swap) if i in lost else m for i, m in enumerate(messages)]
        try:
            found = self.template.trace(other, tools)
        except TemplateError:
            found = Trace("", [])  # the letters matter to it, so nothing is known
        theirs = places_of(found)
        for i, span in places.items():
            if messages[i]["role"] != "assistant" or span is None:
                continue
            their = theirs.get(i)
            if (
                their is None
                or found.text[their.begin : their.end] != trace.text[span.begin : span.end]
            ):
                raise ChatError(
                    i,
                    f"the chat template prints other turns inside it, so the "
                    f"assistant's part is unknown: {_MARK_IT}",
                )

    # Opening

    def _opening(
        self, messages: Messages, tools: Tools, text: str, bare: str, span: Span, others: list[int]
    ) -> int:
        """Where the generation prompt ends. others: where turns of other roles begin."""
        i, begin, end = span.message, span.begin, span.end
        prompt = self._try(messages[:i], tools, generation=True)
        if prompt is not None and begin <= len(prompt) <= end and text.startswith(prompt):
            return len(prompt)
        pieces = self._generation_prompt(messages, tools, i)
        added = "".join(pieces)
        if not added:
            return begin
        at = text.find(added, max(0, begin - len(added)), end)
        if at >= 0 and not self.special.sub("", text[begin:at]).strip():
            return max(begin, at + len(added))
        # An assistant's first turn may follow a default system prompt within its iteration. Letters
        # stand in for special tokens of the content, so a prompt with one is the template's own.
        if self.special.search(added) and (at := bare.find(added, begin, end)) >= 0:
            return at + len(added)
        common = common_length(added, text[begin:end])
        common = self._border(added, common, pieces)
        head = added[:common]
        if common == 0 or any(text.startswith(head, start) for start in others):
            raise ChatError(
                i,
                f"does not begin with the generation prompt {added!r} in the template's "
                f"text, so its beginning is unknown: {_MARK_IT}",
            )
        return begin + common

    def _generation_prompt(self, messages: Messages, tools: Tools, i: int) -> list[str]:
        """The generation prompt behind the chat before turn `i`, in printed pieces."""
        chats = [messages[:i]]
        users = [j for j, m in enumerate(messages[:i]) if m["role"] == "user"]
        if users:
            chats.append(messages[: users[-1] + 1])
        chats += [[{"role": "user", "content": _PROBE}]]
        for chat in chats:
            try:
                with_prompt = self.template.chunks(chat, tools, generation=True)
                without = self.template.chunks(chat, tools)
            except TemplateError as error:
                refusal = str(error)
                continue
            return self._added(without, with_prompt)
        raise ChatError(i, f"the chat template refuses the chat before it: {refusal}")

    def _added(self, without: list[str], with_prompt: list[str]) -> list[str]:
        """The end of the second rendering that the first one lacks.

        Where both end differently (an end token in place of the prompt), whole special tokens and
        lines are compared: `<|end|>` and `<|assistant|>` have nothing in common.
        """
        same = 0
        while same < min(len(without), len(with_prompt)) and without[same] == with_prompt[same]:
            same += 1
        short, long = "".join(without[same:]), "".join(with_prompt[same:])
        if long.startswith(short):
            skip = len(short)
        else:
            skip = self._border(long, common_length(short, long))
        pieces = []
        for piece in with_prompt[same:]:
            pieces.append(piece[skip:])
            skip = max(0, skip - len(piece))
        return [piece for piece in pieces if piece]

    def _border(self, text: str, at: int, pieces: Iterable[str] = ()) -> int:
        """The last place up to `at` where a printed piece ends; else a special token or a line."""
        whole = [end for end in accumulate(map(len, pieces)) if end <= at]
        inner = (found.end() for found in re.finditer(self.special.pattern + r"\s*|\n", text))
        return max(whole or (end for end in inner if end <= at), default=0)

    # Closing

    def _closing(self, bare: str, opening: int, end: int) -> int | None:
        """Behind the end-of-turn token of a turn that ends at `end`; None without one."""
        last = None
        for found in self.special.finditer(bare, opening, end):
            last = found
        if last is not None and not bare[last.end() : end].strip():
            return last.end()
        closing = self._ending().rstrip()
        turn = bare[opening:end].rstrip()
        if closing.strip() and turn.endswith(closing):
            return opening + len(turn)
        following = re.compile(r"\s*(" + self.special.pattern + ")").match(bare, end)
        return following.end() if following is not None else None

    def _ending(self) -> str:
        """The text that the template prints behind a plain content, within the turn."""
        if self._probe_end is None:
            chat = [{"role": r, "content": _PROBE + r} for r in ("user", "assistant")]
            try:
                trace = self.template.trace(chat)
            except TemplateError:
                trace = Trace("", [])
            span = places_of(trace).get(1)
            turn = "" if span is None else trace.text[span.begin : span.end]
            self._probe_end = turn.partition(chat[1]["content"])[2]
        return self._probe_end

    def _without_special(self, messages: Messages, tools: Tools, trace: Trace) -> str:
        """The text with letters in place of special tokens that the messages bring along.

        The text itself if it would come out otherwise than letter by letter.
        """
        if not any(self.special.search(t) for m in messages for t in texts_in(m)):
            return trace.text
        other = [map_text(m, lambda t: self.special.sub(letters, t)) for m in messages]
        try:
            found = self.template.trace(other, tools)
        except TemplateError:
            return trace.text
        same = len(found.text) == len(trace.text) and found.spans == trace.spans
        return found.text if same else trace.text

    def _try(self, messages: Messages, tools: Tools, *, generation: bool = False) -> str | None:
        try:
            return self.template.render(messages, tools, generation=generation)
        except TemplateError:
            return None
