"""Packing as simply as it can be said: the whole corpus in lists of Python, nothing for speed.

The truth that tests compare `data.best_fit` and `data.in_order` with. A document is a list of token
ids, its end token included.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Document = list[int]


@dataclass
class Row:
    """One sequence. segments: (document, place of its first token in it, tokens, BOS before)."""

    segments: list[tuple[int, int, list[int], bool]] = field(default_factory=list)
    flushed: bool = False

    def length(self) -> int:
        return sum(len(tokens) + bos for _, _, tokens, bos in self.segments)

    def tokens(self, seq_len: int, bos: int | None, filler: int) -> list[int]:
        found: list[int] = []
        for _, _, tokens, has_bos in self.segments:
            found += ([bos] if has_bos else []) + tokens
        return found + [filler] * (seq_len - len(found))

    def documents(self, seq_len: int) -> list[int]:
        starts, at = [], 0
        for _, _, tokens, has_bos in self.segments:
            starts.append(at)
            at += len(tokens) + has_bos
        return starts + ([at] if at < seq_len else [])


def best_fit(documents: list[Document], *, seq_len: int, bos: bool, window: int) -> list[Row]:
    bos = bos and seq_len > 1
    rows: list[Row] = []
    pieces: list[tuple[int, int, list[int], bool]] = []
    read = 0

    def empty_window(flushed: bool) -> None:
        bins: list[Row] = []
        for piece in sorted(pieces, key=lambda p: -(len(p[2]) + p[3])):  # stable
            size = len(piece[2]) + piece[3]
            fitting = [b for b in bins if b.length() + size <= seq_len]
            if not fitting:
                bins.append(Row(flushed=flushed))
                fitting = bins[-1:]
            fullest = max(b.length() for b in fitting)
            next(b for b in fitting if b.length() == fullest).segments.append(piece)
        for row in bins:
            row.segments.sort(key=pieces.index)
        rows.extend(sorted(bins, key=lambda row: pieces.index(row.segments[0])))
        pieces.clear()

    for number, document in enumerate(documents):
        at = 0
        while at < len(document):
            cut = bos and at > 0
            part = document[at : at + seq_len - cut]
            piece = (number, at, part, cut)
            at += len(part)
            read += len(part) + cut
            if len(part) + cut == seq_len:
                rows.append(Row([piece]))
            else:
                pieces.append(piece)
            if read >= window * seq_len:
                empty_window(flushed=False)
                read = 0
    empty_window(flushed=True)
    return rows


def in_order(documents: list[Document], *, seq_len: int, bos: bool) -> tuple[list[Row], Row]:
    """(the sequences, the last one that is not full and is dropped)."""
    bos = bos and seq_len > 1
    rows, row = [], Row()
    for number, document in enumerate(documents):
        at = 0
        while at < len(document):
            cut = bos and at > 0
            part = document[at : at + seq_len - row.length() - cut]
            row.segments.append((number, at, part, cut))
            at += len(part)
            if row.length() == seq_len:
                rows.append(row)
                row = Row()
    return rows, row
