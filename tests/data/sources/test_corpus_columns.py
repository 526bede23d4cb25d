"""Values of columns at any depth, and files that differ: what was stored wrongly, or refused."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megadistill.config import DataConfig
from megadistill.data.sources.source import documents

TEXTS = [f'text {i} with "quotes"' for i in range(300)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def units(**data):
    return [list(d.units(i)) for i, d in enumerate(documents(DataConfig(**data)))]


def texts(**data):
    return ["".join(unit.text or "" for unit in found) for found in units(**data)]


def chat(*arguments):
    return [
        {"role": "user", "content": "Call it."},
        *({"role": "assistant", "content": None, "arguments": one} for one in arguments),
    ]


def test_one_value_of_another_type_leaves_the_other_texts_as_they_are(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    rows[200] = {"text": 42}
    found = texts(files=[write(tmp_path / "a.jsonl", rows)])
    assert found == [*TEXTS[:200], "", *TEXTS[201:]]


def test_a_turn_of_another_type_leaves_the_other_turns_as_they_are(tmp_path):
    chats = [chat({"a": 1}), [{"role": "user", "content": ["x", {"y": 1}]}], chat({"b": "z"})]
    file = write(tmp_path / "a.jsonl", [{"chat": one} for one in chats])
    found = documents(DataConfig(files=[file], messages_field="chat"))
    assert [d.messages for d in found] == chats


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_structs_are_given_without_the_nulls_that_pad_them(tmp_path, kind):
    chats = [chat({"a": 1}, {"city": "Bern"}), chat({"more": [{"x": "1"}, {"y": "2"}]}), chat({})]
    table = pa.Table.from_pylist([{"chat": one} for one in chats])
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    found = documents(DataConfig(files=[str(path)], messages_field="chat"))
    assert [d.messages[1:] for d in found] == [one[1:] for one in chats]


def test_a_null_that_the_source_wrote_stays(tmp_path):
    chats = [chat({"city": None, "more": {"x": None}}), chat({"a": 1, "city": "Bern"})]
    rows = [{"chat": one} for one in chats]
    file = write(tmp_path / "a.jsonl", rows)
    found = documents(DataConfig(files=[file], messages_field="chat"))
    assert [d.messages for d in found] == chats


def test_json_values_in_parquet_keep_their_nulls_and_have_no_padding(tmp_path):
    if not hasattr(datasets, "Json"):
        pytest.skip("this release of datasets has no Json")
    chats = [chat({"city": None}), chat({"a": [1, "x"]}), chat({"b": {"c": None}})]
    rows = datasets.Dataset.from_list([{"chat": c} for c in chats], on_mixed_types="use_json")
    rows.to_parquet(tmp_path / "a.parquet")
    found = documents(DataConfig(files=[str(tmp_path / "a.parquet")], messages_field="chat"))
    assert [d.messages[1]["arguments"] for d in found] == [c[1]["arguments"] for c in chats]


def test_chats_are_the_same_from_json_and_from_parquet(tmp_path):
    chats = [chat({"a": 1}, {"city": "Bern", "near": {"x": 1}}), chat({"near": {"y": [2]}})]
    rows = [{"chat": one} for one in chats]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    files = [write(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet")]
    first, second = (
        [d.messages for d in documents(DataConfig(files=[file], messages_field="chat"))]
        for file in files
    )
    assert first == second


@pytest.mark.parametrize("name", ["a[1].jsonl", "[b]/a.jsonl", "c*/[d]?.jsonl"])
def test_a_name_with_characters_of_patterns_is_a_name(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    assert texts(files=[write(path, [{"text": "x"}])]) == ["x"]
    assert texts(files=[str(path.parent / "*.jsonl")]) == ["x"]


def test_a_first_file_of_nulls_says_nothing_about_the_others(tmp_path):
    files = [write(tmp_path / "a.jsonl", [{"text": None}] * 3)]
    files.append(write(tmp_path / "b.jsonl", [{"text": "x"}]))
    assert texts(files=files) == ["", "", "", "x"]


def test_columns_that_nobody_asked_for_decide_nothing(tmp_path):
    files = [
        write(tmp_path / "a.jsonl", [{"text": "a", "id": 1, "meta": {"x": 1}}]),
        write(tmp_path / "b.jsonl", [{"meta": [1], "text": "b"}]),
        write(tmp_path / "c.jsonl", [{"id": "seven", "text": "c", "extra": {}}]),
    ]
    assert texts(files=files) == ["a", "b", "c"]
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"meta": [[1]], "text": ["b"]}), tmp_path / "b.parquet")
    assert texts(files=[str(tmp_path / "*.parquet")]) == ["a", "b"]


def test_zstd_is_read(tmp_path):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(b'{"text": "x"}\n')
    (tmp_path / "a.jsonl.zst").write_bytes(sink.getvalue().to_pybytes())
    assert texts(files=[str(tmp_path / "a.jsonl.zst")]) == ["x"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx")
    assert texts(files=[str(tmp_path / "a.txt")]) == ["x"]
