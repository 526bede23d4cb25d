"""Sequence of a cache, for people: the text, and beside it what the teacher expects next.

The facts behind `tools/inspect_cache.py --show`. A cache holds ids. Their text needs the tokenizer,
of which the recipe has a hash of the content only.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

from megadistill.cache.reader import Cache
from megadistill.data.token_text import escaped
from megadistill.errors import StoreError
from megadistill.models.packed_sequences import IGNORED, sample_labels
from megadistill.targets import SparseTargets, find_method

Facts = dict[str, Any]
Text = Callable[[int], str]

_TOKEN = 20  # columns that a token's text may take


def target_row(targets: SparseTargets, position: int) -> Facts:
    """The target of one position, plain values: entries in the order they are kept."""
    start, stop = int(targets.offsets[position]), int(targets.offsets[position + 1])
    row: Facts = {
        "ids": targets.ids[start:stop].tolist(),
        "weights": targets.weights[start:stop].tolist(),
        "tail": float(targets.tail[position]),
    }
    if targets.heads is not None:
        row["heads"] = int(targets.heads[position])
    if targets.truth_added is not None:
        row["truth_added"] = bool(targets.truth_added[position])
    for name, values in (("entropy", targets.entropy), ("nll", targets.nll)):
        if values is not None:
            value = float(values[position])
            row[name] = None if math.isnan(value) else value
    return row


def sequence_facts(cache: Cache, index: int, positions: str | None = None) -> Facts:
    """Sequence `index`, position by position.

    positions  "A:B" for those from A up to B, either end may be left out; None: all
    Raises StoreError for a number that the cache does not hold, CorruptBlockError.
    """
    sample = _sample(cache, index)
    length = len(sample["tokens"])
    next_tokens = sample_labels(sample, masked=False)
    masked = sample.get("loss_mask", np.ones(length, np.uint8)) == 0
    starts = set(sample["documents"].tolist())
    padding = int(sample.get("padding", 0))
    return {
        "path": str(cache.path),
        "sequence": index,
        "block": index // cache.store.block_size,
        "length": length,
        "padding": padding,
        "documents": len(starts) - (padding > 0),
        "method": sample["targets"].method,
        "positions": [
            {
                "position": n,
                "token": int(sample["tokens"][n]),
                "document_begins": n in starts,
                "masked": bool(masked[n]),
                "padding": n >= length - padding,
                "next_token": None if next_tokens[n] == IGNORED else int(next_tokens[n]),
                **target_row(sample["targets"], n),
            }
            for n in _range(positions, length)
        ],
    }


def _sample(cache: Cache, index: int) -> Facts:
    held = cache.num_sequences if cache.num_sequences is not None else len(cache)
    if not 0 <= index < held:
        raise StoreError(
            f"{cache.path}: has no sequence {index}, expected a number from 0 to {held - 1}"
            if held
            else f"{cache.path}: holds no sequence yet"
        )
    return cache[index]


def _range(text: str | None, length: int) -> range:
    first, colon, last = (text or ":").partition(":")
    try:
        start, stop = int(first or 0), int(last or length)
    except ValueError:
        start, stop, colon = 0, 0, ""
    if not colon or not 0 <= start < stop <= length:
        raise StoreError(
            f"--positions {text}: expected A:B with A below B, from 0:{length} of this sequence"
        )
    return range(start, stop)


# As text ------------------------------------------------------------------------------------------


def sequence_text(facts: Facts, *, text_of: Text | None, width: int) -> str:
    """A line a position, no wider than `width` columns, or 80.

    text_of  an id's text; None shows ids
    """
    quoted = str if text_of is None else (lambda token: f'"{escaped(text_of(token))}"')
    width, positions = max(80, width), facts["positions"]
    sampled = find_method(facts["method"]).sampled
    rows = [row for row in positions if not row["padding"]]
    column = min(_TOKEN, max([5, *(_columns(quoted(row["token"])) for row in rows)]))
    lines = [
        f"{facts['path']}: sequence {facts['sequence']} (block {facts['block']}): "
        f"{facts['length']} positions, documents or pieces of documents: {facts['documents']}",
        f"A token, then what the teacher expects to come next ({facts['method']}), most probable",
        "first; [ ] marks what does come next. Entropy and nll in nats.",
        *(["Equal weights belong to ids drawn by chance."] if sampled else []),
        *(["m: masked, not to be learned."] if any(row["masked"] for row in rows) else []),
        f"  pos    {'token':<{column}}  entropy    nll  expected next",
    ]
    for row in rows:
        if row["document_begins"]:
            lines.append("         " + "-- document ".ljust(width - 9, "-"))
        start = (
            f"{row['position']:>5} {'m' if row['masked'] else ' '}  "
            f"{_fit(quoted(row['token']), column)}  "
            f"{_nats(row.get('entropy')):>7}  {_nats(row.get('nll')):>5}  "
        )
        lines.append(
            start + _expected(row, lambda t: _cut(quoted(t), _TOKEN), width - _columns(start))
        )
    if len(rows) < len(positions):
        lines.append("         " + f"-- padding: {len(positions) - len(rows)} tokens")
    return "\n".join(lines)


def _expected(row: Facts, name: Callable[[int], str], room: int) -> str:
    """As many entries as there is room for, the next token among them where it is kept."""
    if not row["ids"]:
        return "no target" if row["next_token"] is not None else "no target: nothing comes next"
    order = sorted(zip(row["ids"], row["weights"], strict=True), key=lambda e: (-e[1], e[0]))
    truth = next((entry for entry in order if entry[0] == row["next_token"]), None)
    kept = 0 if truth else 1
    while kept < len(order) and _columns(_listed(order, kept + 1, truth, name)) <= room:
        kept += 1
    return _listed(order, kept, truth, name)


def _listed(order: list, kept: int, truth: Any, name: Callable[[int], str]) -> str:
    """The first `kept` entries and the true one, and how many are left out."""
    chosen = order[:kept]
    if truth is not None and truth not in chosen:
        chosen = [*chosen, truth]
    said = [f"{name(token)} {weight:.3f}" for token, weight in chosen]
    said = [f"[{s}]" if entry == truth else s for s, entry in zip(said, chosen, strict=True)]
    return "  ".join(said + ([f"+{len(order) - len(chosen)}"] if len(chosen) < len(order) else []))


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _columns(text: str) -> int:
    """Columns of a terminal: East Asian characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _cut(text: str, width: int) -> str:
    if _columns(text) <= width:
        return text
    while _columns(text) > width - 2:
        text = text[:-1]
    return f"{text}.."


def _fit(text: str, width: int) -> str:
    text = _cut(text, width)
    return text + " " * (width - _columns(text))
