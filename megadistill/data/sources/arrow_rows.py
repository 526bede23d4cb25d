"""Rows of parquet and arrow files. Only the columns asked for are read and decoded.

Parquet says how many rows its row groups have, and arrow files are mapped into memory, so passing
over rows costs next to nothing.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megadistill.data.sources.arrow_values import decoded
from megadistill.data.sources.compressed import reason, shown
from megadistill.data.sources.row import Row, Skip
from megadistill.errors import DataError

BATCH = 64  # rows that are decoded at a time: their text may be large, so few


def read(path: str, kind: str, fields: list[str], skip: Skip) -> Iterator[Row]:
    """The rows of a file. DataError: the file cannot be read."""
    with _errors(path), ExitStack() as stack:
        batches = _parquet if kind == "parquet" else _arrow
        for first, batch in batches(path, fields, skip, stack):
            yield from rows(batch, fields, first)


def rows(table: Any, fields: list[str], first: int) -> Iterator[Row]:
    """The rows of a table, numbered from `first` on."""
    for at in range(0, table.num_rows, BATCH):
        batch = table.slice(at, BATCH)
        there = [field for field in fields if field in batch.column_names]
        found = dict(zip(there, decoded(batch.select(there)), strict=True))
        # A file of chats may lack their tools.
        columns = [found.get(field) or [None] * batch.num_rows for field in fields]
        for number, values in enumerate(zip(*columns, strict=True), first + at):
            yield Row(f"row {number}", values)


def columns(path: str, kind: str) -> list[str] | None:
    """The columns of a file; None: it has no rows. Empty tables are often saved without columns."""
    import pyarrow.parquet

    with _errors(path), ExitStack() as stack:
        if kind == "parquet":
            file = stack.enter_context(Path(path).open("rb"))
            table = pyarrow.parquet.ParquetFile(file)
            return table.schema_arrow.names if table.metadata.num_rows else None
        schema, batches = _open_arrow(path, stack)
        return schema.names if any(batch.num_rows for batch in batches) else None


@contextmanager
def _errors(path: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, ValueError, KeyError, NotImplementedError, pyarrow.ArrowException) as error:
        raise DataError(f"{shown(path)}: cannot be read: {reason(error)}") from error


def _parquet(
    path: str, fields: list[str], skip: Skip, stack: ExitStack
) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    # Opened here, since Arrow reads some names as URLs.
    opened = stack.enter_context(Path(path).open("rb"))  # noqa: SIM115 - closed by the stack
    file = pyarrow.parquet.ParquetFile(opened)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    group = first = 0
    while group < len(sizes) and skip.left >= sizes[group]:
        first += skip.take(sizes[group])
        group += 1
    groups = list(range(group, len(sizes)))
    there = [field for field in fields if field in file.schema_arrow.names]
    for batch in file.iter_batches(BATCH, row_groups=groups, columns=there) if groups else ():
        passed = skip.take(batch.num_rows)
        yield first + passed, pyarrow.Table.from_batches([batch]).slice(passed)
        first += batch.num_rows


def _arrow(path: str, fields: list[str], skip: Skip, stack: ExitStack) -> Iterator[tuple[int, Any]]:
    import pyarrow

    first = 0
    for batch in _open_arrow(path, stack)[1]:
        passed = skip.take(batch.num_rows)
        if passed < batch.num_rows:
            there = [field for field in fields if field in batch.schema.names]
            batch = batch.select(there).slice(passed)
            batch.validate(full=True)  # offsets of a damaged file would be followed anywhere
            yield first + passed, pyarrow.Table.from_batches([batch])
            first += batch.num_rows
        first += passed


def _open_arrow(path: str, stack: ExitStack) -> tuple[Any, Iterator[Any]]:
    """(schema, record batches) of a file in Arrow's stream or file format."""
    import pyarrow

    # Mapped here: Arrow opens no name that is not UTF-8.
    opened = stack.enter_context(Path(path).open("rb"))  # noqa: SIM115 - closed by the stack
    mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    file = pyarrow.BufferReader(pyarrow.py_buffer(mapped))
    if file.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    file.seek(0)
    stream = pyarrow.ipc.open_stream(file)
    return stream.schema, iter(stream)
