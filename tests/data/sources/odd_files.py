"""A table of odd files: what is in each, and what must come of it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@dataclass(frozen=True)
class Odd:
    """name: of the file. content: its bytes, or a function that writes it.

    texts: what is stored; None: as `datasets` in Python format reads the file. refused: a part of
    the line that refuses it. data: further keys.
    """

    name: str
    content: bytes | Callable[[Path], None]
    texts: list[str] | None = None
    refused: str | None = None
    data: dict[str, Any] | None = None

    def write(self, folder: Path) -> str:
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content)
        return str(path)


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(column: Any, **others: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table({"text": column, **others}), path)


def arrow(column: Any, *, file: bool = False, **others: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        table = pa.table({"text": column, **others})
        new = pa.ipc.new_file if file else pa.ipc.new_stream
        with path.open("wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)

    return write


def cut(write: Callable[[Path], None], part: float) -> Callable[[Path], None]:
    def write_cut(path: Path) -> None:
        write(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * part)])

    return write_cut


A, B = {"text": "first text"}, {"text": "second text"}
TWO = ["first text", "second text"]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PLAIN = lines(A, B)
STRINGS = pa.array([*TWO, None])
JSON = pa.array([json.dumps(t) for t in TWO], pa.json_())
MANY_DIGITS = b"1" * 5000
DEEP = b"[" * 200_000 + b"]" * 200_000

JSON_FILES = [
    Odd("plain.jsonl", PLAIN),
    Odd("plain.ndjson", PLAIN),
    Odd("UPPER.JSONL", PLAIN, TWO),
    Odd("no_last_newline.jsonl", PLAIN[:-1]),
    Odd("crlf.jsonl", PLAIN.replace(b"\n", b"\r\n")),
    Odd("blank_lines.jsonl", b"\n\n" + PLAIN.replace(b"\n", b"\n \t\n\n")),
    Odd("bom.jsonl", b"\xef\xbb\xbf" + PLAIN),
    Odd("bom_array.json", b"\xef\xbb\xbf" + json.dumps([A, B]).encode(), TWO),
    Odd("utf16.jsonl", PLAIN.decode().encode("utf-16"), refused="found UTF-16 text, expected UTF"),
    Odd("array.json", json.dumps([A, B]).encode()),
    Odd("array_indented.json", json.dumps([A, B], indent=2).encode()),
    Odd("array_of_texts.json", json.dumps(TWO).encode()),
    Odd("array_named_jsonl.jsonl", json.dumps([A, B]).encode()),
    Odd("empty_array.json", b" [ ] \n", refused="the corpus is empty"),
    Odd("array_cut.json", json.dumps([A, B]).encode()[:-3], refused="1: it ends in the mid"),
    Odd("array_and_more.json", json.dumps([A]).encode() + b"x", refused="line 1: more text behind"),
    Odd("array_without_comma.json", b'[{"text": "a"}\n {"text": "b"}]', refused="line 2: expected"),
    Odd("array_of_mixed.json", b'[{"text": "a"}, 5]', refused="row 1: expected an object with col"),
    Odd("one_object.json", json.dumps(A, indent=2).encode()),
    Odd("objects_over_lines.json", b'{\n"text": "first text"}\n{"text":\n"second text"}'),
    Odd("objects_in_a_line.json", b'{"text": "first text"} {"text": "second text"}\n'),
    Odd("nested.json", json.dumps({"data": [A, B]}).encode(), refused="its columns are data: set"),
    Odd("by_column.json", json.dumps({"text": TWO}).encode(), refused="'text': expected text, "),
    Odd("key_missing.jsonl", lines(A, {"id": 1}, B)),
    Odd("empty_object.jsonl", lines(A, {}, B)),
    Odd("null.jsonl", lines({"text": None}, A, {"text": None})),
    Odd("all_null.jsonl", lines({"text": None}, {"text": None}), refused="the corpus is empty"),
    Odd("a_number.jsonl", lines(A, {"text": 42}), refused="line 2: column 'text': expected text"),
    Odd("a_number_below_blanks.jsonl", b"\n\n" + lines(A, {"text": 1}), refused="jsonl: line 4: c"),
    Odd("a_boolean.jsonl", lines({"text": True}, A), refused="line 1: column 'text': expected"),
    Odd("a_list.jsonl", lines(A, {"text": ["x"]}), refused="expected text, found a list"),
    Odd("a_dictionary.jsonl", lines(A, {"text": {"a": 1}}), refused="expected text, found a dict"),
    Odd("nan.jsonl", b'{"text": NaN}\n', refused="expected text, found a number: nan"),
    # `datasets` makes dates of these, and numbers where one value is a number.
    Odd(
        "dates.jsonl",
        lines({"text": "2020-01-01"}, {"text": "2021-01-01"}),
        ["2020-01-01", "2021-01-01"],
    ),
    Odd("digits.jsonl", lines({"text": "42"}, {"text": "[1]"}, {"text": "null"}, {"text": '"q"'})),
    Odd("nul_character.jsonl", lines({"text": "a\0b"})),
    Odd("line_separators.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode()),
    Odd("escapes.jsonl", b'{"text": "\\ud83d\\ude00 \\u00e9 \\/ \\n"}\n'),
    Odd("emoji.jsonl", json.dumps({"text": "\U0001f600 \u00e9"}, ensure_ascii=False).encode()),
    Odd(
        "half_surrogate.jsonl",
        lines(A) + b'{"text": "a\\ud800"}\n',
        refused="line 2: column 'text': half of a surrogate pair, \\ud800, at character 2",
    ),
    Odd(
        "key_twice.jsonl",
        lines(A) + b'{"text": "a", "text": "b"}\n',
        refused="line 2: column 'text' is there twice",
    ),
    Odd("other_key_twice.jsonl", b'{"text": "a", "id": 1, "id": 2, "x": {"a": 1, "a": 1}}', ["a"]),
    Odd("other_huge.jsonl", b'{"text": "a", "id": ' + MANY_DIGITS + b"}\n", ["a"]),
    Odd("other_nan.jsonl", b'{"text": "a", "x": NaN, "y": -Infinity}\n', ["a"]),
    Odd("other_half_surrogate.jsonl", b'{"text": "a", "id": "\\ud800"}\n', ["a"]),
    Odd(
        "others_differ.jsonl",
        lines({**A, "id": 1}, {"id": "x", **B}, {"text": "c", "id": [{}]}),
        [*TWO, "c"],
    ),
    Odd("other_deep.jsonl", b'{"text": "a", "x": ' + DEEP + b"}\n", refused="nested too deeply"),
    Odd("a_raw_newline.jsonl", lines(A) + b'{"text": "a\nb"}\n', refused="line 2: no JSON: Inval"),
    Odd("a_comma_after.jsonl", b'{"text": "a"},\n', refused="line 1: no JSON: Extra data at char"),
    Odd("broken_line.jsonl", lines(A) + b'{"text": "a"\n' + lines(B), refused="line 2: no JSON: E"),
    Odd("single_quotes.jsonl", b"{'text': 'a'}\n", refused="line 1: no JSON: Expecting property"),
    Odd("cut.jsonl", PLAIN[:-8], refused="line 2: no JSON: Unterminated string"),
    Odd("control_character.jsonl", lines(A) + b'{"text": "a\x0bb"}\n', refused="line 2: no JSON"),
    Odd("no_objects.jsonl", b'"a"\n"b"\n', refused="line 1: expected an object with columns, fou"),
    Odd("an_object_and_text.jsonl", lines(A, "b"), refused="line 2: expected an object with colum"),
    Odd(
        "latin1.jsonl",
        lines(A) + '{"text": "\xe9"}\n'.encode("latin-1"),
        refused="line 2: no UTF-8 text: byte 0xe9 at byte 11",
    ),
    Odd(
        "plain_text.jsonl", b"Some text.\nMore text.\n", refused="line 1: no JSON: Expecting value"
    ),
    Odd("html.json", b"<html><body>404</body></html>", refused="html.json: "),
    Odd("empty.jsonl", b"", refused="the corpus is empty (0 bytes"),
    Odd("white_space.jsonl", b" \n\t\r\n ", refused="the corpus is empty: none of its files has a"),
    Odd(
        "too_long.jsonl",
        lines(A, {"text": "x" * (2 << 20)}, B),
        data={"max_document_mib": 1},
        refused="line 2: longer than data.max_document_mib",
    ),
    Odd(
        "too_long_in_array.json",
        json.dumps([A, {"text": "x" * (2 << 20)}, B]).encode(),
        data={"max_document_mib": 1},
        refused="longer than data.max_document_mib",
    ),
    Odd(
        "long_array.json",
        json.dumps([{"text": "x" * 500_000}] * 9).encode(),
        data={"max_document_mib": 1},
    ),
    Odd("named_otherwise.jsonl", lines({"content": "a"}), refused="its columns are content: set d"),
    Odd("named_by_key.jsonl", lines({"content": "a"}), ["a"], data={"text_field": "content"}),
    Odd("key_of_no_column.jsonl", PLAIN, refused="data.text_field: ", data={"text_field": "body"}),
    Odd(
        "text_and_messages.jsonl",
        lines({"text": "a", "messages": []}),
        refused="has the columns messages and text, expected one of them: set data.messages_field",
    ),
    Odd(
        "two_texts.jsonl", lines({"text": "a", "messages": []}), ["a"], data={"text_field": "text"}
    ),
    Odd("prompt_alone.jsonl", lines({"text": "a", "prompt": "p"}), ["a"]),
]
COMPRESSED_FILES = [
    *(Odd(f"plain.jsonl{end}", make(PLAIN), TWO) for end, make in COMPRESS.items()),
    *(
        Odd(f"two_parts.jsonl{end}", make(lines(A)) + make(lines(B)), TWO)
        for end, make in COMPRESS.items()
    ),
    *(
        Odd(f"array.json{end}", make(json.dumps([A, B]).encode()), TWO)
        for end, make in COMPRESS.items()
    ),
    *(
        Odd(f"cut.jsonl{end}", make(PLAIN * 50)[:-6], refused=f"cut.jsonl{end}: cannot be read: ")
        for end, make in COMPRESS.items()
    ),
    *(Odd(f"no.jsonl{end}", PLAIN, refused=f"no.jsonl{end}: cannot be read: ") for end in COMPRESS),
    *(
        Odd(f"text.txt{end}", make(b"\xef\xbb\xbfa text"), ["a text"])
        for end, make in COMPRESS.items()
    ),
    *(
        Odd(
            f"bomb.txt{end}",
            make(b"x" * (3 << 20)),
            data={"max_document_mib": 1},
            refused=f"bomb.txt{end}: longer than data.max_document_mib",
        )
        for end, make in COMPRESS.items()
    ),
    Odd("UPPER.JSONL.GZ", gzip.compress(PLAIN), TWO),
    *(
        Odd(f"garbage_behind.jsonl{end}", make(PLAIN) + b"garbage", refused="cannot be read: ")
        for end, make in COMPRESS.items()
    ),
    *(
        Odd(f"zeros_behind.jsonl{end}", COMPRESS[end](PLAIN) + bytes(512), TWO)
        for end in (".gz", ".bz2", ".xz")
    ),
    *(
        # The second of three parts is damaged: the third must not be lost in silence.
        Odd(
            f"damaged_part.jsonl{end}",
            make(lines(A)) + b"x" + make(lines(B))[1:] + make(lines(B)),
            refused="cannot be read: ",
        )
        for end, make in COMPRESS.items()
    ),
    Odd("utf16_unmarked.jsonl", PLAIN.decode().encode("utf-16-le"), refused="found UTF-16 text"),
    Odd("utf16_unmarked.txt", "a text".encode("utf-16-be"), refused="-f UTF-16BE -t UTF-8"),
    Odd("utf32.jsonl", PLAIN.decode().encode("utf-32"), refused="found UTF-32 text, expected UTF"),
    Odd("pointer.jsonl", LFS, refused="found a pointer of Git LFS, expected the file"),
    Odd("pointer.txt", LFS, refused="found a pointer of Git LFS, expected the file"),
    Odd("hidden.jsonl", gzip.compress(PLAIN), refused="found gzip data, expected a name that ends"),
    Odd("hidden_zst.jsonl", zstd(PLAIN), refused="found zstd data, expected a name that ends in"),
    Odd("hidden.txt", lzma.compress(PLAIN), refused="hidden.txt: found xz data, expected a name"),
    Odd("archive.txt", b"PK\x03\x04 and so on", refused="found a zip archive, expected a plain"),
    Odd("twice.jsonl.gz.zst", zstd(gzip.compress(PLAIN)), refused="cannot tell what it holds by"),
    Odd("table.parquet.gz", gzip.compress(b"PAR1"), refused="parquet files are compressed inside"),
    Odd("corpus.tar.gz", gzip.compress(b"x"), refused="cannot tell what it holds by its name"),
]
TABLE_FILES = [
    Odd("string.parquet", parquet(STRINGS)),
    Odd("large_string.parquet", parquet(STRINGS.cast(pa.large_string()))),
    Odd("view.parquet", parquet(STRINGS.cast(pa.string_view()))),
    Odd("dictionary.parquet", parquet(STRINGS.dictionary_encode())),
    Odd("json.parquet", parquet(JSON)),
    Odd("null.parquet", parquet(pa.nulls(3)), refused="the corpus is empty"),
    Odd("row_groups.parquet", lambda path: pq.write_table(pa.table({"text": STRINGS}), path, 1)),
    Odd(
        "compressed.parquet",
        lambda path: pq.write_table(pa.table({"text": STRINGS}), path, compression="zstd"),
    ),
    Odd(
        "other_map.parquet",
        parquet(STRINGS, other=pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64()))),
        TWO,
    ),
    Odd("other_dotted.parquet", parquet(STRINGS, **{"text.more": pa.array([1, 2, 3])})),
    Odd("binary.parquet", parquet(pa.array([b"a"])), refused="row 0: column 'text': expected text"),
    Odd("numbers.parquet", parquet(pa.array([1, 2])), refused="expected text, found a number: 1"),
    Odd("lists.parquet", parquet(pa.array([["a"], ["b"]])), refused="expected text, found a list"),
    Odd(
        "map.parquet",
        parquet(pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))),
        refused="map.parquet: ",
    ),
    Odd(
        "mixed_json.parquet",
        parquet(pa.array(['"a"', "42"], pa.json_())),
        refused="row 1: column 'text': expected text, found a number: 42",
    ),
    Odd("no_rows.parquet", parquet(pa.array([], pa.string())), refused="the corpus is empty"),
    Odd("cut.parquet", cut(parquet(STRINGS), 0.7), refused="cut.parquet: cannot be read: "),
    Odd("garbage.parquet", b"PAR1 and nothing more", refused="garbage.parquet: cannot be read: "),
    Odd("string.arrow", arrow(STRINGS)),
    Odd("file_format.arrow", arrow(STRINGS, file=True)),
    Odd("view.arrow", arrow(STRINGS.cast(pa.string_view()))),
    Odd("dictionary.arrow", arrow(STRINGS.dictionary_encode())),
    Odd("json.arrow", arrow(JSON)),
    Odd("cut.arrow", cut(arrow(pa.array(TWO * 500)), 0.5), refused="cut.arrow: cannot be read: "),
    Odd("garbage.arrow", b"ARROW1 and nothing more", refused="garbage.arrow: cannot be read: "),
    Odd(
        "not_utf8.arrow",
        arrow(pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"]).buffers())),
        refused="not_utf8.arrow: ",
    ),
]
TEXT_FILES = [
    Odd("plain.txt", b"A text.\n", ["A text.\n"]),
    Odd("crlf.txt", b"a\r\nb\rc", ["a\r\nb\rc"]),
    Odd("bom.md", b"\xef\xbb\xbfa\xef\xbb\xbfb", ["a\ufeffb"]),
    Odd("utf16.txt", "text".encode("utf-16"), refused="utf16.txt: found UTF-16 text, expected"),
    Odd("utf32.txt", "text".encode("utf-32"), refused="utf32.txt: found UTF-32 text, expected"),
    Odd("latin1.txt", b"caf\xe9", refused="byte 0xe9 near byte 4: convert the file to UTF-8"),
    Odd("cut_character.txt", b"caf\xc3", refused="cut_character.txt: cannot be read as UTF-8 te"),
    Odd("late.txt", b"x" * (2 << 20) + b"\xff", refused=f"byte 0xff near byte {(2 << 20) + 1}"),
    Odd(
        "across_chunks.txt",
        b"x" * ((1 << 20) - 1) + "\u20ac!".encode(),
        ["x" * ((1 << 20) - 1) + "\u20ac!"],
    ),
    Odd("nul.txt", b"a\0b", ["a\0b"]),
    Odd("white_space.txt", b" \n ", [" \n "]),
    Odd("empty.txt", b"", refused="the corpus is empty (0 bytes"),
    Odd("no_ending", b"text", refused="cannot tell what it holds by its name"),
]
NAMES = [
    "[brackets].jsonl",
    "a*b?.jsonl",
    "{a,b}.jsonl",
    "::x.jsonl",
    "zip:__a.jsonl",
    "a#b%20c.jsonl",
    "a b\tc.jsonl",
    "-leading.jsonl",
    "new\nline.jsonl",
    "\u00fcn\u0131.jsonl",
    "~home.jsonl",
    "hf:/datasets/a.jsonl",
    "[folder]/a*.jsonl/[x].jsonl",
    "train[:10%]/data.jsonl",
    "'quo\"te.jsonl",
    "$HOME.jsonl",
    "a\\b.jsonl",
    "file:/x.jsonl",
    "..jsonl.jsonl",
]
NAMED_FILES = [
    *(Odd(name, PLAIN, TWO) for name in NAMES),
    *(Odd(name.replace(".jsonl", ".txt"), b"a text", ["a text"]) for name in NAMES),
    *(Odd(name.replace(".jsonl", ".parquet"), parquet(STRINGS), TWO) for name in NAMES),
]
ALL = [*JSON_FILES, *COMPRESSED_FILES, *TABLE_FILES, *TEXT_FILES, *NAMED_FILES]
