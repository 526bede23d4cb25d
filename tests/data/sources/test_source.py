import gzip
import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megadistill.config import DataConfig
from megadistill.data.sources.document import Document
from megadistill.data.sources.source import count_documents, documents, source_identity
from megadistill.errors import DataError

TEXTS = [f"document {i}: " + "x" * (i % 7) for i in range(150)]


def write_json(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(start=0, **data):
    return [d.text for d in documents(DataConfig(**data), start)]


@pytest.fixture
def corpora(tmp_path):
    """The same texts as json lines, parquet, arrow, and a folder by name."""
    table = pa.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "folder").mkdir()
    rows = [{"text": t, "id": i} for i, t in enumerate(TEXTS)]
    write_json(tmp_path / "folder" / "train.jsonl", rows)
    return {
        "json": {"files": [write_json(tmp_path / "a.jsonl", rows)]},
        "parquet": {"files": [str(tmp_path / "a.parquet")]},
        "arrow": {"files": [str(tmp_path / "a.arrow")]},
        "folder": {"name": str(tmp_path / "folder")},
        "streamed": {"name": str(tmp_path / "folder"), "streaming": True, "max_samples": 999},
    }


@pytest.mark.parametrize("kind", ["json", "parquet", "arrow", "folder", "streamed"])
def test_every_kind_of_corpus_gives_its_documents_in_order_from_any_start(corpora, kind):
    assert texts(**corpora[kind]) == TEXTS
    for start in (0, 1, 63, 64, 65, 149, 150):
        assert texts(start, **corpora[kind]) == TEXTS[start:]


@pytest.mark.parametrize("kind", ["json", "folder", "streamed"])
def test_shuffled_documents_are_the_same_ones_in_an_order_by_the_seed(corpora, kind):
    shuffled = texts(**corpora[kind], shuffle=True)
    assert shuffled != TEXTS
    assert sorted(shuffled) == sorted(TEXTS)
    assert texts(**corpora[kind], shuffle=True) == shuffled
    assert texts(**corpora[kind], shuffle=True, seed=1) != shuffled
    assert texts(77, **corpora[kind], shuffle=True) == shuffled[77:]
    fewer = corpora[kind] | {"max_samples": 20}
    assert texts(**fewer, shuffle=True) == shuffled[:20]


def test_a_stream_longer_than_a_window_is_shuffled_and_resumed_alike(tmp_path, monkeypatch):
    monkeypatch.setattr("megadistill.data.sources.tables.WINDOW", 40)
    rows = [{"text": t} for t in TEXTS]
    data = {"files": [write_json(tmp_path / "a.jsonl", rows)], "shuffle": True}
    data |= {"streaming": True, "max_samples": 1000}
    shuffled = texts(**data)
    assert sorted(shuffled[:40]) == sorted(TEXTS[:40])
    for start in (39, 40, 41, 120, 149):
        assert texts(start, **data) == shuffled[start:]


def test_no_more_than_max_samples_are_read(corpora):
    data = corpora["json"] | {"max_samples": 10}
    assert texts(**data) == TEXTS[:10]
    assert texts(8, **data) == TEXTS[8:10]
    assert texts(12, **data) == []
    assert count_documents(DataConfig(**data)) == 10
    assert count_documents(DataConfig(**corpora["json"])) is None


def test_the_corpus_is_known_by_its_content_and_not_by_its_path(corpora, tmp_path):
    original = DataConfig(**corpora["json"])
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(Path(original.files[0]).read_bytes())
    same = DataConfig(files=[str(moved)], max_samples=7)
    assert source_identity(same) == source_identity(original)
    moved.write_bytes(moved.read_bytes().replace(b"document 9:", b"document X:"))
    assert source_identity(same) != source_identity(original)


def test_a_text_file_is_one_document_whatever_its_size(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    long = "line of text\n" * 60_000
    (tmp_path / "a.txt").write_text(long)
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("third")
    found = list(documents(DataConfig(files=[str(tmp_path / "*.txt*")])))
    units = [list(d.units(i)) for i, d in enumerate(found)]
    assert ["".join(u.text for u in us) for us in units] == [long, "second", "third"]
    assert len(units[0]) == 3
    assert [(u.first, u.last) for u in units[0]] == [(True, False), (False, False), (False, True)]


def test_a_text_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (document,) = documents(DataConfig(files=[str(tmp_path / "a.txt")]))
    (unit,) = document.units(0)
    assert unit.place.endswith("a.txt")
    assert unit.problem.startswith("cannot be read as UTF-8 text: byte 0xe9 near byte 4")


def test_the_standard_library_has_two_splits_that_share_nothing():
    train = list(documents(DataConfig(source="python-stdlib")))
    held_out = list(documents(DataConfig(source="python-stdlib", split="validation")))
    assert len(train) > 300
    assert 10 < len(held_out) < len(train) / 8
    identities = [
        source_identity(DataConfig(source="python-stdlib", split=s))
        for s in ("train", "validation")
    ]
    assert identities[0]["content"] != identities[1]["content"]
    argparse = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
    assert (Document(text=argparse) in train) != (Document(text=argparse) in held_out)
    assert not any("class TestArgumentParser" in (d.text or "") for d in train)


def test_chats_come_as_they_were_written(tmp_path):
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "B"}],
        [{"role": "system", "content": "s"}],
        [],
    ]
    file = write_json(tmp_path / "a.jsonl", [{"chat": c} for c in chats])
    found = documents(DataConfig(files=[file], messages_field="chat"))
    assert [d.messages for d in found] == chats


def test_prompts_come_with_their_completions(tmp_path):
    file = write_json(tmp_path / "a.jsonl", [{"q": "1?", "a": "one"}, {"q": None, "a": "two"}])
    found = documents(DataConfig(files=[file], prompt_field="q", completion_field="a"))
    assert list(found) == [
        Document(prompt="1?", completion="one"),
        Document(prompt="", completion="two"),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"files": ["none/*.jsonl"]}, "data.files: no file matches 'none/*.jsonl'"),
        ({"files": ["empty.jsonl"]}, "empty.jsonl: the corpus is empty"),
        (
            {"files": ["a.jsonl"], "text_field": "content"},
            "columns are text, id: set data.text_field",
        ),
        ({"files": ["a.jsonl", "a.txt"]}, "one kind at a time"),
        ({"files": ["a.bin"]}, "a.bin: cannot tell what it holds"),
        ({"files": ["broken.parquet"]}, "broken.parquet: cannot be read"),
        ({"files": ["a.jsonl"], "split": "test"}, "data.split: data.files have no splits"),
        ({"name": "folder", "split": "nowhere"}, "nowhere"),
        ({"source": "python-stdlib", "split": "test"}, "set it to train or validation"),
        ({"name": "nobody/nothing"}, "data.name: nobody/nothing cannot be found on the hub"),
    ],
)
def test_a_wrong_corpus_is_one_line(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "a.jsonl", [{"text": "x", "id": 1}])
    Path("folder").mkdir()
    write_json(tmp_path / "folder" / "train.jsonl", [{"text": "x"}])
    for name, content in {"empty.jsonl": b"", "a.txt": b"x", "a.bin": b"x"}.items():
        Path(name).write_bytes(content)
    Path("broken.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError) as info:
        list(documents(DataConfig(**data)))
    assert message in str(info.value)
    assert "\n" not in str(info.value)
