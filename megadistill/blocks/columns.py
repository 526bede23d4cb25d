"""How a sample becomes bytes: the MDS encodings a store uses, and the checksum of a sample.

A record is what mosaicml-streaming's MDS format makes of a sample, columns in name order:

    uint32 size of each column without a fixed size | the columns' bytes

The column `sum` (uint64) is xxh3_64 over the record without the eight bytes of `sum`, seeded with
the sequence number, so that a whole record in the wrong place is found as surely as a flipped bit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from megadistill.errors import CorruptBlockError, StoreError

_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int32", "int64", "float32")
_DIMENSIONS = re.compile(r"(?:[0-9]{1,9}(?:,[0-9]{1,9}){0,3})?")
_DIMENSION_DTYPES = ("<u1", "<u2", "<u4", "<u8")  # how MDS writes the shape of a ragged array


@dataclass(frozen=True)
class Column:
    """Column of a store: its name, its MDS encoding, and the encoding taken apart."""

    name: str
    encoding: str
    dtype: np.dtype | None  # None: bytes as they are
    shape: tuple[int, ...] | None  # None: any length (one dimension); () a scalar

    @property
    def size(self) -> int | None:
        """Bytes of every value, where that is fixed."""
        if self.dtype is None or self.shape is None:
            return None
        return math.prod(self.shape) * self.dtype.itemsize

    def encode(self, value: Any) -> bytes:
        """The bytes MDS writes for `value`. ValueError for a value that is not the column's."""
        if self.dtype is None:
            return bytes(value)
        if self.shape == ():
            return np.asarray(value, self.dtype).tobytes()
        if not isinstance(value, np.ndarray) or value.dtype != self.dtype:
            found = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"column {self.name} is {found}, expected {self.dtype}")
        if self.shape is not None:
            if value.shape != self.shape:
                raise ValueError(f"column {self.name} is {value.shape}, expected {self.shape}")
            return value.tobytes()
        if value.ndim != 1 or not len(value):
            raise ValueError(f"column {self.name} is {value.shape}, expected [length >= 1]")
        code = next(c for c in range(4) if len(value) < 1 << (8 << c))
        length = np.array([len(value)], _DIMENSION_DTYPES[code]).tobytes()
        return bytes([1 << 2 | code]) + length + value.tobytes()

    def decode(self, data: memoryview, *, file: str) -> Any:
        """The value; arrays are fresh copies. CorruptBlockError where the bytes do not fit."""
        if self.dtype is None:
            return bytes(data)
        if self.shape == ():
            return int(np.frombuffer(data, self.dtype)[0])
        if self.shape is not None:
            return np.frombuffer(data, self.dtype).reshape(self.shape).copy()
        start = 1 + (1 << (data[0] & 3)) if len(data) else 0
        if not len(data) or data[0] >> 2 != 1 or len(data) < start:
            raise CorruptBlockError(file, f"one dimension in column {self.name}", len(data))
        length = int(np.frombuffer(data[1:start], _DIMENSION_DTYPES[data[0] & 3])[0])
        if length * self.dtype.itemsize != len(data) - start:
            raise CorruptBlockError(
                file, f"{length} values in column {self.name}", f"{len(data) - start} bytes"
            )
        return np.frombuffer(data[start:], self.dtype).copy()


def parse_columns(columns: dict[str, str]) -> list[Column]:
    """The columns in name order, as MDS keeps them. StoreError for an unknown encoding."""
    return [_parse(name, columns[name]) for name in sorted(columns)]


def encode_record(
    columns: list[Column], sample: dict[str, Any], *, sequence: int
) -> tuple[bytes, int]:
    """(one sample's record, its `sum`). A `sum` in the sample is not looked at."""
    head: list[int] = []
    body: list[bytes] = []
    before_sum = 0
    for column in columns:
        if column.name == "sum":
            before_sum = sum(map(len, body))
            continue
        data = column.encode(sample[column.name])
        if column.size is None:
            head.append(len(data))
        body.append(data)
    sizes = np.array(head, "<u4").tobytes()
    record = sizes + b"".join(body)
    digest = xxhash.xxh3_64_intdigest(record, seed=sequence)
    cut = len(sizes) + before_sum
    return record[:cut] + digest.to_bytes(8, "little") + record[cut:], digest


def decode_record(
    columns: list[Column], record: bytes, *, sequence: int, file: str
) -> dict[str, Any]:
    """The sample in a record, verified by its `sum`. CorruptBlockError otherwise."""
    view = memoryview(record)
    spans = _spans(columns, view, file=file)
    start, stop = spans["sum"]
    found = int.from_bytes(record[start:stop], "little")
    digest = xxhash.xxh3_64(record[:start], seed=sequence)
    digest.update(record[stop:])
    if digest.intdigest() != found:
        raise CorruptBlockError(
            f"{file}, sequence {sequence}", f"xxh3 {digest.hexdigest()}", f"{found:016x}"
        )
    return {c.name: c.decode(view[slice(*spans[c.name])], file=file) for c in columns}


def hashed_part(columns: list[Column], record: bytes, *, file: str) -> bytes:
    """The record without its `sum`: what a content hash is taken over."""
    start, stop = _spans(columns, memoryview(record), file=file)["sum"]
    return record[:start] + record[stop:]


def _spans(columns: list[Column], view: memoryview, *, file: str) -> dict[str, tuple[int, int]]:
    ragged = sum(c.size is None for c in columns)
    at = 4 * ragged
    if len(view) < at:
        raise CorruptBlockError(file, f"a record of at least {at} bytes", len(view))
    sizes = iter(np.frombuffer(view[:at], "<u4").tolist())
    spans = {}
    for column in columns:
        stop = at + (next(sizes) if column.size is None else column.size)
        spans[column.name] = (at, stop)
        at = stop
    if at != len(view):
        raise CorruptBlockError(file, f"a record of {at} bytes", f"{len(view)} bytes")
    return spans


def _parse(name: str, encoding: str) -> Column:
    if encoding == "bytes":
        return Column(name, encoding, None, None)
    if encoding == "uint64":
        return Column(name, encoding, np.dtype("<u8"), ())
    kind, _, rest = encoding.partition(":")
    dtype, _, dimensions = rest.partition(":")
    if kind == "ndarray" and dtype in _DTYPES:
        known = _DIMENSIONS.fullmatch(dimensions)
        shape = tuple(map(int, dimensions.split(","))) if dimensions and known else None
        if known and (shape is None or all(shape)):
            return Column(name, encoding, np.dtype(dtype).newbyteorder("<"), shape)
    raise StoreError(
        f"column {name!r:.80}: encoding {encoding!r:.80} is not known, expected bytes, uint64 or "
        "ndarray:DTYPE[:SHAPE]"
    )
