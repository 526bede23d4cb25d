"""Cutting a long text into pieces that are tokenised one after the other.

A tokenizer holds some 100 bytes for each token it makes, so a text of a gigabyte in one go would
need tens of gigabytes. A piece is at most `PIECE` characters. Pieces end where a word of common
pre-tokenizers ends anyway (after a line break, or else before a space, that stands alone), so
byte-level tokenizers make the same tokens of the pieces as of the whole text; one that marks the
beginning of a text adds its mark to every piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PIECE = 256 * 1024  # characters
_LINE = re.compile(r"(?<=\S)\n(?=\S)")
_SPACE = re.compile(r"(?<=\S)(?= \S)")


def split_text(chunks: Iterable[str], *, piece: int = PIECE) -> Iterator[str]:
    """The text that `chunks` make together, in pieces; an empty text gives one empty piece.

    Where the cuts lie depends on the text only, not on the chunks.
    """
    rest = ""
    for chunk in chunks:
        rest = rest + chunk if rest else chunk
        begin = 0
        while len(rest) - begin > piece:
            end = _cut(rest, begin, begin + piece)
            yield rest[begin:end]
            begin = end
        rest = rest[begin:] if begin else rest
    yield rest


def _cut(text: str, begin: int, end: int) -> int:
    """Where the piece that starts at `begin` and may reach to `end` < len(text) ends."""
    # One character beyond `end` is there: enough for the patterns to look ahead.
    for span in (4096, end - begin):  # near the end first: a pattern goes through all of its text
        for pattern in (_LINE, _SPACE):
            found = [m.end() for m in pattern.finditer(text, max(begin + 1, end - span), end + 1)]
            found = [at for at in found if at <= end]
            if found:
                return found[-1]
    return end
