"""Places of messages in the text that a chat template printed."""

from __future__ import annotations

from megadistill.data.chat.template import Span, Trace


def places_of(trace: Trace) -> dict[int, Span | None]:
    """The one span of each message that printed something; None where there are several.

    Iterations that print nothing or white space count if there is no other.
    """
    spans: dict[int, list[Span]] = {}
    for span in trace.spans:
        if span.end > span.begin:
            spans.setdefault(span.message, []).append(span)
    found: dict[int, Span | None] = {}
    for message, all_of in spans.items():
        printing = [s for s in all_of if trace.text[s.begin : s.end].strip()] or all_of[-1:]
        one = printing[0] if len(printing) == 1 else None
        if one is not None and _holds_another(one, trace):
            one = None
        found[message] = one
    return found


def _holds_another(span: Span, trace: Trace) -> bool:
    return any(
        other.message != span.message
        and span.begin <= other.begin
        and other.end <= span.end
        and trace.text[other.begin : other.end].strip()
        for other in trace.spans
    )
