"""Generated tables: every value as `datasets` in Python format gives it."""

import datasets
import pytest

from megadistill.config import DataConfig
from megadistill.data.sources.arrow_values import text_problem
from megadistill.data.sources.source import documents
from megadistill.data.sources.tables import LocalFiles
from tests.data.sources.generated_tables import Table, write

LIMIT = 1 << 30


def truth(table: Table) -> list[dict]:
    """The rows as `datasets` reads the file, or as they were written where it cannot."""
    datasets.disable_progress_bars()
    files = {"train": [table.path]}
    try:
        rows = datasets.load_dataset(table.kind, data_files=files, split="train", streaming=True)
        if rows.features is None:  # it streams arrays without decoding them
            cache = f"{table.path}.cache"
            rows = datasets.load_dataset(
                table.kind, data_files=files, split="train", cache_dir=cache
            )
        return list(rows)
    except (datasets.exceptions.DatasetsError, ValueError, TypeError):
        # Types that change within a file: `datasets` reads no such json.
        assert table.rows is not None
        return table.rows


def without_nulls(value):
    """`value` without keys at null: those that `datasets` pads."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def padding(value):
    """Whether a key at null is left that is no turn's content."""
    if isinstance(value, dict):
        return any((v is None and k != "content") or padding(v) for k, v in value.items())
    return isinstance(value, list) and any(padding(v) for v in value)


def check(table: Table) -> None:
    expected = truth(table)
    rows = list(LocalFiles(table.kind, [table.path], LIMIT).rows(["text", "messages"], 0))
    assert [row.problem for row in rows] == [None] * len(expected)
    for row, right in zip(rows, expected, strict=True):
        text, messages = row.values
        assert text == right["text"]
        assert without_nulls(messages) == without_nulls(right["messages"])
    if table.rows is not None:  # json: what the line says, with the nulls that it says
        assert [row.values for row in rows] == [(r["text"], r["messages"]) for r in table.rows]
    found = list(documents(DataConfig(files=[table.path], text_field="text")))
    for document, right in zip(found, expected, strict=True):
        if isinstance(right["text"], str | None):
            assert document.text == (right["text"] or "")
        else:
            assert f"column 'text': {text_problem(right['text'], limit=LIMIT)}" == document.problem
    for start in range(len(found) + 1):
        if start % 4 == 1:
            later = documents(DataConfig(files=[table.path], text_field="text"), start)
            assert list(later) == found[start:]


def test_a_sample_of_generated_tables_is_read_as_datasets_reads_it(tmp_path):
    for seed in range(100):
        check(write(tmp_path, seed))


@pytest.mark.long
@pytest.mark.text
@pytest.mark.parametrize("part", range(10))
def test_500_generated_tables_are_read_as_datasets_reads_them(tmp_path, part):
    for seed in range(500 * part, 500 * (part + 1)):
        check(write(tmp_path, seed))


def test_structs_of_typed_files_carry_no_padding(tmp_path):
    kinds = set()
    for seed in range(100, 140):
        table = write(tmp_path, seed)
        rows = LocalFiles(table.kind, [table.path], LIMIT).rows(["messages"], 0)
        if table.rows is None:
            kinds.add(table.kind)
            assert table.path.endswith("parquet") or not any(padding(r.values[0]) for r in rows)
    assert kinds == {"parquet", "arrow"}
