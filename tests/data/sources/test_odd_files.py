"""Odd files: each gives the text that `datasets` in Python format gives, or one line."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from megadistill.config import DataConfig
from megadistill.data.counts import statistics
from megadistill.data.sources.source import documents, with_tools
from megadistill.data.tokens import build_tokens
from megadistill.errors import DataError
from tests.data.sources import odd_files
from tests.data.sources.odd_files import A, B, Odd, lines
from tests.data.stores import same_store

KINDS = {".parquet": "parquet", ".arrow": "arrow"}


def stored(odd: Odd, path: str) -> list[str]:
    """The texts that are tokenised; documents without text are dropped."""
    found = []
    for number, document in enumerate(documents(DataConfig(files=[path], **(odd.data or {})))):
        units = list(document.units(number))
        assert all(unit.problem is None for unit in units)
        found.append("".join(unit.text or "" for unit in units))
    return [text for text in found if text]


def refusal(odd: Odd, path: str) -> str:
    """The first line that refuses the file, as build_tokens words it."""
    number, texts = 0, 0
    try:
        for document in documents(DataConfig(files=[path], **(odd.data or {}))):
            for unit in document.units(number):
                if unit.problem is not None:
                    return f"{unit.place}: {unit.problem}"
                texts += bool(unit.text)
            number += 1
    except DataError as error:
        return str(error)
    return "nothing refuses it" if texts else f"{path}: the corpus is empty"


def truth(odd: Odd, path: str) -> list[str]:
    kind = KINDS.get(Path(path).suffix.lower(), "json")
    datasets.disable_progress_bars()
    rows = datasets.load_dataset(kind, data_files={"train": [path]}, split="train", streaming=True)
    return [row["text"] for row in rows if row["text"]]


@pytest.mark.parametrize("odd", odd_files.ALL, ids=lambda odd: ascii(odd.name))
def test_an_odd_file_gives_the_text_that_datasets_gives_or_one_line(odd, tmp_path):
    path = odd.write(tmp_path)
    if odd.refused is not None:
        line = refusal(odd, path)
        assert odd.refused in line
        assert "\n" not in line
        assert Path(path).name.split(".")[0] in line
    elif odd.texts is not None:
        assert stored(odd, path) == odd.texts
    else:
        assert stored(odd, path) == truth(odd, path)


def test_the_table_has_at_least_seventy_kinds():
    assert len(odd_files.ALL) >= 70
    assert len({odd.name for odd in odd_files.ALL}) == len(odd_files.ALL)


@pytest.mark.parametrize("start", range(5))
def test_every_kind_of_file_is_read_from_any_row(tmp_path, start):
    for odd in [*odd_files.JSON_FILES, *odd_files.COMPRESSED_FILES, *odd_files.TABLE_FILES]:
        if odd.refused is None:
            config = DataConfig(files=[odd.write(tmp_path)], **(odd.data or {}))
            assert list(documents(config, start)) == list(documents(config))[start:], odd.name


def test_text_files_of_any_name_in_one_folder_are_found_by_a_pattern(tmp_path):
    for number, name in enumerate(odd_files.NAMES):
        if "/" not in name:
            (tmp_path / "[all] of*them").mkdir(exist_ok=True)
            (tmp_path / "[all] of*them" / name.replace("jsonl", "txt")).write_text(f"{number}")
    config = DataConfig(files=[str(tmp_path / "[all] of*them" / "*.txt")])
    found = ["".join(u.text or "" for u in d.units(0)) for d in documents(config)]
    names = sorted(
        n.replace("jsonl", "txt") for n in odd_files.NAMES if n[:1] != "." and "/" not in n
    )
    order = {name.replace("jsonl", "txt"): str(i) for i, name in enumerate(odd_files.NAMES)}
    assert found == [order[name] for name in names]


def test_names_that_are_no_utf8_are_found_by_a_pattern(tmp_path):
    for end, content in (
        (".jsonl", odd_files.PLAIN),
        (".txt", b"first text"),
        (".parquet", odd_files.parquet(odd_files.STRINGS)),
        (".arrow", odd_files.arrow(odd_files.STRINGS)),
    ):
        Path(Odd(f"plain{end}", content).write(tmp_path)).rename(tmp_path / f"caf\udce9{end}")
        config = DataConfig(files=[str(tmp_path / f"*{end}")])
        first = next(documents(config))
        assert "".join(u.text for u in first.units(0)) == "first text"
        assert "caf\\udce9" in first.place


@pytest.mark.parametrize("name", ["[folder]", "a*b?", "x::y", "c#d%20e", "plain"])
def test_a_folder_by_its_name_may_have_any_name(tmp_path, name, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    Odd(f"{name}/train.jsonl", odd_files.PLAIN).write(tmp_path)
    found = list(documents(DataConfig(name=str(tmp_path / name))))
    assert [d.text for d in found] == odd_files.TWO
    assert found[0].place == f"{tmp_path / name}/train.jsonl: line 1"
    (tmp_path / name / "train.jsonl").rename(tmp_path / name / "train.txt")
    for streaming in ({}, {"streaming": True, "max_samples": 9}):
        (first, _) = documents(DataConfig(name=str(tmp_path / name), **streaming))
        assert json.loads(first.text) == A


def test_columns_that_are_not_read_may_differ_between_files(tmp_path):
    odd = [
        Odd("a.jsonl", lines({"text": "a", "id": 1})),
        Odd("b.jsonl", lines({"id": "x", "text": "b"})),
        Odd("c.jsonl", lines({"text": "c"})),
        Odd("d.jsonl", lines({"text": None, "id": {"a": [1]}}, {"text": "d"})),
        Odd("e.jsonl", b""),
        Odd("f.jsonl", b"\n \n"),
    ]
    paths = [one.write(tmp_path) for one in odd]
    found = [d.text for d in documents(DataConfig(files=paths))]
    assert found == ["a", "b", "c", "", "d"]


def test_the_first_file_may_be_all_null(tmp_path):
    for end, write in ((".parquet", odd_files.parquet), (".arrow", odd_files.arrow)):
        write(odd_files.pa.nulls(2))(tmp_path / f"a{end}")
        write(odd_files.STRINGS)(tmp_path / f"b{end}")
        found = [d.text for d in documents(DataConfig(files=[str(tmp_path / f"*{end}")]))]
        assert found == ["", "", "first text", "second text", ""]


def test_a_file_that_lacks_the_column_is_named_before_anything_is_read(tmp_path):
    Odd("a.jsonl", lines(A)).write(tmp_path)
    Odd("b.jsonl", lines({"content": "x"})).write(tmp_path)
    reader = documents(DataConfig(files=[str(tmp_path / "*.jsonl")]))
    with pytest.raises(DataError, match=r"data.text_field: .*b.jsonl has no column 'text'; its"):
        next(reader)


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": []}, {"messages_field": "messages"}),
        ({"conversations": []}, {"messages_field": "conversations"}),
        (
            {"prompt": "p", "completion": "c", "id": 1},
            {"prompt_field": "prompt", "completion_field": "completion"},
        ),
        ({"completion": "c", "text": "t"}, {"text_field": "text"}),
    ],
)
def test_columns_are_found_as_if_they_had_been_configured(tmp_path, row, fields):
    from megadistill.data.sources.source import resolved, source_identity

    found = DataConfig(files=[Odd("a.jsonl", lines(row)).write(tmp_path)])
    configured = found.model_copy(update=fields)
    assert resolved(found) == configured
    assert source_identity(found) == source_identity(configured)


def test_a_folder_a_missing_file_and_an_unreadable_one_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "gone.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    Odd("a.jsonl", lines(A)).write(tmp_path)
    for name, said in {
        "folder.jsonl": "is a folder, expected files: name them, for example",
        "dangling.jsonl": "is a link to nothing",
        "pipe.jsonl": "is no regular file",
        "gone.jsonl": "no file matches",
        "a\0b.jsonl": "no file is named",
        "[a.jsonl": "no file matches",
    }.items():
        with pytest.raises(DataError, match=r"^data.files: ") as info:
            next(documents(DataConfig(files=[str(tmp_path / name)])))
        assert said in str(info.value)
        assert "\n" not in str(info.value)
    symlink = tmp_path / "link.jsonl"
    symlink.symlink_to(tmp_path / "a.jsonl")
    assert [d.text for d in documents(DataConfig(files=[str(symlink)]))] == ["first text"]
    Odd("b.jsonl", lines(B)).write(tmp_path)
    reader = documents(DataConfig(files=[str(symlink), str(tmp_path / "b.jsonl")]))
    assert next(reader).text == "first text"
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b.jsonl: cannot be read: No such file or directory"):
        next(reader)


@pytest.fixture
def mixture(tmp_path):
    """Files of all kinds of json, good documents and bad ones, as one corpus."""
    folder = tmp_path / "files"
    for number, odd in enumerate([*odd_files.JSON_FILES, *odd_files.COMPRESSED_FILES]):
        if odd.data is None and odd.name.split(".")[1].startswith("json"):
            odd = Odd(f"{number:03d}_{odd.name}", odd.content)
            path = odd.write(folder)
            with contextlib.suppress(DataError):
                for document in documents(DataConfig(files=[path], text_field="text")):
                    assert document.place
                continue
            Path(path).unlink()  # its damage is not that of one document
    return [str(folder / "*")]


def test_a_corpus_of_odd_files_gives_equal_stores_at_1_2_and_5_workers(config, mixture, tmp_path):
    shape = {"files": mixture, "seq_len": 16, "block_size": 5, "on_bad_document": "skip"}
    stores = []
    for workers in (1, 5):
        settings = config(**shape, workers=workers, dir=str(tmp_path / f"store{workers}"))
        stores.append(build_tokens(settings))
    assert statistics(stores[0])["skipped_documents"] >= 15
    assert stores[0].num_blocks > 6
    lists = [Path(f"{store.path}.run", "skipped.jsonl").read_bytes() for store in stores]
    for store, skipped in zip(stores[1:], lists[1:], strict=True):
        assert same_store(stores[0].path, store.path)
        assert skipped == lists[0]
    killed = config(**shape, workers=2, dir=str(tmp_path / "killed"))
    program = (
        "import os, signal, sys\n"
        "from megadistill.blocks import BlockWriter\n"
        "from megadistill.config import Config\n"
        "from megadistill.data.tokens import build_tokens\n"
        "commit = BlockWriter.commit\n"
        "def commit_and_die(self, block, *args, **kwargs):\n"
        "    commit(self, block, *args, **kwargs)\n"
        "    if block == 4:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "BlockWriter.commit = commit_and_die\n"
        "build_tokens(Config.model_validate_json(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", program, killed.model_dump_json()]
    code = subprocess.run(command, cwd=Path(__file__).parents[3], check=False).returncode
    assert code == -9
    build_tokens(killed)
    assert same_store(stores[0].path, killed.data.dir)
    assert Path(f"{killed.data.dir}.run", "skipped.jsonl").read_bytes() == lists[0]


def test_the_stored_tokens_decode_to_the_text_of_the_file(config, tmp_path, tokenizer):
    hf = AutoTokenizer.from_pretrained(tokenizer)
    rows = [{"text": f"text {i}: \u00e9\U0001f600\0\u2028"} for i in range(30)]
    for name in ("a.jsonl.zst", "b.jsonl.xz"):
        data = odd_files.COMPRESS[Path(name).suffix](lines(*rows))
        Odd(name, data).write(tmp_path)
    store = build_tokens(config(files=[str(tmp_path / "*.jsonl.*")], seq_len=8, pack="concat"))
    text = hf.decode([t for sample in store for t in sample["tokens"]])
    expected = "".join(f"{row['text']}<|end|>" for row in rows) * 2
    assert expected.startswith(text)
    assert len(text) > len(expected) - 40


def test_the_program_refuses_an_odd_file_with_one_line_and_code_2(tmp_path, tokenizer):
    root = Path(__file__).parents[3]
    path = Odd("a_number.jsonl", lines(A, B, {"text": 42})).write(tmp_path)
    command = [
        sys.executable,
        str(root / "tools" / "make_tokens.py"),
        "--config",
        "demo",
        "data.tokenizer=null",
        f"data.files=[{path}]",
        "data.source=null",
        f"data.dir={tmp_path / 'tokens'}",
        f"teacher.model={tokenizer}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, done.stderr
    assert "a_number.jsonl: line 3: column 'text': expected text, found a number: 42" in error[0]
    assert "data.on_bad_document=skip" in error[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tokens").exists()


logging.getLogger("datasets").setLevel(logging.CRITICAL)


def test_a_file_is_read_once_by_whatever_names_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (Odd(f"{n}.jsonl", lines({"text": n})).write(tmp_path) for n in "ab")
    os.symlink(tmp_path, tmp_path / "loop")
    for names in (["a.jsonl", "./a.jsonl", one, "*.jsonl"], ["**/*.jsonl"], [one, two]):
        assert [d.text for d in documents(DataConfig(files=names))] == ["a", "b"]


def test_a_path_that_a_shell_or_a_client_would_resolve_says_what_to_write(tmp_path):
    for name, advice in (("~/a.jsonl", "write the path from /"), ("hf://a/b.jsonl", "data.name")):
        with pytest.raises(DataError, match=f"no file matches.*{advice}"):
            next(documents(DataConfig(files=[name])))


def test_files_without_rows_decide_nothing(tmp_path):
    odd_files.pq.write_table(odd_files.pa.table({}), tmp_path / "a.parquet")
    odd_files.parquet(odd_files.STRINGS)(tmp_path / "b.parquet")
    found = documents(DataConfig(files=[str(tmp_path / "*.parquet")]))
    assert [d.text for d in found if d.text] == odd_files.TWO


def test_a_column_may_begin_late_in_a_file(tmp_path):
    odd = Odd("a.jsonl", lines(*[{"id": 1}] * 1500, A))
    config = DataConfig(files=[odd.write(tmp_path)], text_field="text")
    assert [d.text for d in documents(config) if d.text] == [A["text"]]


@pytest.mark.parametrize("end", [".jsonl", ".parquet"])
@pytest.mark.parametrize("first", [True, False])
def test_tools_may_be_in_some_of_the_files(tmp_path, end, first):
    chat, tool = [{"role": "user", "content": "q"}], [{"name": "f"}]
    rows = [{"messages": chat, "tools": tool}, {"messages": chat}]
    for name, row in zip("ab", rows if first else rows[::-1], strict=True):
        if end == ".jsonl":
            Odd(name + end, lines(row)).write(tmp_path)
        else:
            odd_files.pq.write_table(odd_files.pa.Table.from_pylist([row]), tmp_path / (name + end))
    config = with_tools(DataConfig(files=[str(tmp_path / f"*{end}")]))
    found = [d.tools for d in documents(config)]
    assert found == ([tool, None] if first else [None, tool])
    with pytest.raises(DataError, match=r"data.tools_field: .*there is no column 'functions'"):
        next(documents(DataConfig(files=[str(tmp_path / f"*{end}")], tools_field="functions")))
