"""Random tables with columns of mixed, nested types, written as files of every kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.sources.odd_files import COMPRESS

# No text here looks like a date or like JSON: `datasets` would make dates and numbers of some.
WORDS = [
    "alpha",
    "\u00e9t\u00e9",
    "\U0001f600",
    "two words",
    " edge ",
    "line\nline",
    "tab\t",
    "x\0y",
    "'",
    '"q',
]
STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@dataclass(frozen=True)
class Table:
    """path: the file. rows: what was written, where that can be compared with what is read."""

    path: str
    kind: str
    rows: list[dict[str, Any]] | None


def write(folder: Path, seed: int) -> Table:
    """One random table as a file, whose kind and types depend on the seed."""
    draw = random.Random(seed)
    make = draw.choice([_typed_parquet, _typed_arrow, _json_lines, _json_lines, _json_parquet])
    return make(draw, folder / f"table{seed}")


def _typed_parquet(draw: random.Random, path: Path) -> Table:
    table = _typed(draw)
    path = path.with_suffix(".parquet")
    compression = draw.choice(["none", "snappy", "zstd", "gzip"])
    pq.write_table(table, path, draw.choice([1, 3, 1000]), compression=compression)
    return Table(str(path), "parquet", None)


def _typed_arrow(draw: random.Random, path: Path) -> Table:
    table = _typed(draw)
    path = path.with_suffix(".arrow")
    new = draw.choice([pa.ipc.new_stream, pa.ipc.new_file])
    with path.open("wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=draw.choice([1, 2, 1000]))
    return Table(str(path), "arrow", None)


def _json_lines(draw: random.Random, path: Path) -> Table:
    rows = _rows(draw)
    ascii_only = draw.random() < 0.5
    layout = draw.choice(["lines", "lines", "lines", "array"])
    if layout == "array":
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=draw.choice([None, 1]))
    else:
        end = draw.choice(["\n", "\r\n", "\n\n"])
        text = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    data = (b"\xef\xbb\xbf" if draw.random() < 0.1 else b"") + text.encode()
    ending = draw.choice(["", "", *COMPRESS])
    path = path.with_suffix(f".jsonl{ending}")
    path.write_bytes(COMPRESS[ending](data) if ending else data)
    return Table(str(path), "json", rows)


def _json_parquet(draw: random.Random, path: Path) -> Table:
    """Rows of mixed types in parquet: what fits no type is stored as `Json`."""
    rows = _rows(draw)
    path = path.with_suffix(".parquet")
    options = {"on_mixed_types": "use_json"} if hasattr(datasets, "Json") else {}
    datasets.Dataset.from_list(rows, **options).to_parquet(path)
    return Table(str(path), "parquet", None)


def _typed(draw: random.Random) -> pa.Table:
    count = draw.randint(1, 9)
    columns = {"text": _texts(draw, count), "messages": _chats(draw, count)}
    for number in range(draw.randint(0, 3)):
        columns[f"other{number}"] = _other(draw, count)
    names = list(columns)
    draw.shuffle(names)
    return pa.table({name: columns[name] for name in names})


def _texts(draw: random.Random, count: int) -> pa.Array:
    if draw.random() < 0.15:  # no text: refused row by row
        values = [draw.choice([None, draw.randint(-9, 9)]) for _ in range(count)]
        return draw.choice([pa.array(values, pa.int64()), pa.array([[v] for v in values])])
    texts = pa.array([_text(draw) for _ in range(count)], pa.string())
    kind = draw.choice(STRINGS)
    return texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)


def _chats(draw: random.Random, count: int) -> pa.Array:
    text, values = (
        draw.choice(STRINGS),
        draw.choice([pa.int64(), pa.string(), pa.list_(pa.string())]),
    )
    if not pa.types.is_string(text):
        text = draw.choice([pa.string(), pa.large_string()])
    arguments = pa.struct([("a", pa.int64()), ("b", values), ("c", pa.struct([("d", text)]))])
    turn = pa.struct([("role", text), ("content", text), ("arguments", arguments)])
    of = draw.choice([pa.list_, pa.large_list])

    def value() -> Any:
        if pa.types.is_int64(values):
            return draw.randint(0, 9)
        return _text(draw) if pa.types.is_string(values) else [_text(draw)]

    def one() -> dict[str, Any]:
        keys = {"a": draw.randint(0, 9), "b": value(), "c": {"d": _text(draw)}, "none": 0}
        kept = {k: v for k, v in keys.items() if k != "none" and draw.random() < 0.6}
        turn = {"role": draw.choice(["user", "assistant"]), "content": _text(draw)}
        return turn | ({"arguments": kept} if draw.random() < 0.5 else {})

    chats = [[one() for _ in range(draw.randint(0, 3))] for _ in range(count)]
    return pa.array(chats, of(turn))


def _other(draw: random.Random, count: int) -> pa.Array:
    make: list[Callable[[], pa.Array]] = [
        lambda: pa.array([draw.random() for _ in range(count)], pa.float32()),
        lambda: pa.nulls(count),
        lambda: pa.array([b"\xff"] * count),
        lambda: pa.array([{"x": [{"y": 1}]}] * count),
        lambda: pa.array([1] * count, pa.timestamp("us")),
        lambda: pa.array([json.dumps({"k": None})] * count, pa.json_()),
    ]
    return draw.choice(make)()


def _rows(draw: random.Random) -> list[dict[str, Any]]:
    mixed = draw.random() < 0.4
    rows = []
    for _ in range(draw.randint(1, 9)):
        row: dict[str, Any] = {"text": _text(draw), "messages": _turns(draw, mixed)}
        if mixed and draw.random() < 0.3:
            row["text"] = draw.choice([7, 2.5, True, ["a"], {"a": "b"}, None])
        if draw.random() < 0.3:
            row["other"] = draw.randint(0, 9)
        rows.append(row)
    return rows


def _turns(draw: random.Random, mixed: bool) -> list[dict[str, Any]]:
    def value(depth: int = 0) -> Any:
        if not mixed:
            return draw.randint(0, 9)
        kinds = [draw.randint(0, 9), _text(draw) or "", None, True]
        if depth < 2:
            kinds += [[value(depth + 1)], {"k": value(depth + 1)}]
        return draw.choice(kinds)

    turns = []
    for _ in range(draw.randint(1, 3)):
        turn: dict[str, Any] = {"role": "user", "content": _text(draw)}
        if draw.random() < 0.4:
            turn["arguments"] = {k: value() for k in "abc" if draw.random() < 0.7}
        turns.append(turn)
    return turns


def _text(draw: random.Random) -> str | None:
    if draw.random() < 0.1:
        return draw.choice([None, ""])
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 4)))
