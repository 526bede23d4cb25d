"""Whole numbers to bytes and back: the one primitive that all streams of the codec are made of.

A stream is a list of numbers from 0. Each becomes a symbol of one byte, and below it some bits as
they are:

    below `direct`    the number is the symbol
    from `direct` on  u = number - direct + 1 has b = floor(log2(u)) bits below its highest one: the
                      symbol is direct + b, and those b bits follow as they are

With direct = 0 that is the octave and the place in it: right for ranks, whose distribution is close
to uniform within an octave (of 1/x, 0.03 bits are lost to that). With direct = 192, levels and
counts are symbols of their own, and still may be of any size.

Symbols are deflated (RFC 1951, Huffman codes alone), a block for each stream, so that each has its
own code: 3 % above the streams' entropy at 2,048 positions, and 15 bytes a stream for its table.
zlib serves better here than zstd (RFC 8878), whose tables are as large and whose blocks cost 10
bytes more. Bits that are raw stand in 32-bit words behind, least significant first.

The reader works alike on numpy arrays and on torch tensors of any device: symbols are inflated on
the host, 1 to 2 bytes an entry travel, and the rest is arithmetic on whole streams.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import numpy as np

from megadistill.errors import CorruptBlockError

RANKS, LEVELS, BYTES = 0, 192, 256  # the values of `direct` in use
_WIDEST = 32  # bits that stand raw below one symbol, at most

Array = Any  # np.ndarray or torch.Tensor


class SymbolWriter:
    """Collects streams; `symbols` and `bits` are what became of them."""

    def __init__(self) -> None:
        self.streams: list[bytes] = []
        self._values: list[np.ndarray] = []
        self._widths: list[np.ndarray] = []

    def put(self, numbers: np.ndarray, direct: int) -> None:
        """Append a stream of numbers, 0 to 2^32."""
        numbers = np.asarray(numbers, np.int64)
        beyond = numbers >= direct
        u = np.where(beyond, numbers - direct + 1, 1)
        # frexp is exact below 2^53, which log2 is not.
        octave = np.frexp(u.astype(np.float64))[1] - 1
        symbols = np.where(beyond, direct + octave, numbers)
        self.streams.append(symbols.astype(np.uint8).tobytes())
        wide = beyond & (octave > 0)
        if wide.any():
            self._widths.append(octave[wide].astype(np.int64))
            self._values.append((u - (np.int64(1) << octave))[wide])

    def symbols(self) -> bytes:
        """The symbols of all streams, deflated."""
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        parts = [deflate.compress(s) + deflate.flush(zlib.Z_BLOCK) for s in self.streams if s]
        return b"".join(parts) + deflate.flush()

    def bits(self) -> bytes:
        """The raw bits of all streams, in whole 32-bit words."""
        if not self._values:
            return b""
        values, widths = np.concatenate(self._values), np.concatenate(self._widths)
        ends = np.cumsum(widths)
        starts = ends - widths
        words = np.zeros(-(-int(ends[-1]) // 32) + 1, np.int64)
        shifted = values << (starts & 31)
        # Numbers do not overlap: adding them up is putting them side by side.
        np.add.at(words, starts >> 5, shifted & 0xFFFFFFFF)
        np.add.at(words, (starts >> 5) + 1, shifted >> 32)
        return words[:-1].astype("<u4").tobytes()


def inflate(data: bytes, count: int, *, file: str) -> tuple[bytes, bytes]:
    """(exactly `count` symbols, the bytes behind them). CorruptBlockError, before it makes more."""
    # A Huffman code has at least one bit: nothing that was written as above unpacks to more.
    if count > 8 * len(data):
        raise CorruptBlockError(file, f"at most {8 * len(data)} symbols", count)
    unpacker = zlib.decompressobj(-15)
    try:
        symbols = unpacker.decompress(data, count + 1)
    except zlib.error as error:
        raise CorruptBlockError(file, "deflated symbols", str(error)) from error
    if len(symbols) != count or not unpacker.eof:
        raise CorruptBlockError(file, f"{count} symbols", len(symbols))
    return symbols, unpacker.unused_data


class SymbolReader:
    """Takes streams in the order in which they were put.

    symbols  uint8 [S], numpy or torch
    words    int64 [W + 1], 32 raw bits each, a zero word last; where `symbols` is; written over
    """

    def __init__(self, symbols: Array, words: Array, *, file: str) -> None:
        self._symbols, self._file = symbols, file
        # Two words side by side: any number of up to 32 bits lies in one of these whole.
        words[:-1] |= words[1:] << 32
        self._pairs = words
        self._bits = 32 * (len(words) - 1)
        self._at = self._bit = 0

    def take(self, count: int, direct: int) -> Array:
        """int64 [count]: the next stream."""
        stop = self._at + count
        if stop > len(self._symbols):
            raise CorruptBlockError(self._file, f"{stop} symbols", len(self._symbols))
        symbols = self._symbols[self._at : stop]
        self._at = stop
        if direct == BYTES or not count:
            return _int64(symbols)
        top = int(symbols.max())
        if top < max(direct, 1):
            return _int64(symbols)
        if top > direct + _WIDEST:
            raise CorruptBlockError(self._file, f"symbols up to {direct + _WIDEST}", top)
        index = _int64(symbols)
        width_S, base_S, mask_S = _tables(direct, self._symbols)
        widths = width_S.take(index)
        starts = widths.cumsum(0)
        used = int(starts[-1])
        starts -= widths
        starts += self._bit
        self._bit += used
        if self._bit > self._bits:
            raise CorruptBlockError(self._file, f"{self._bit} raw bits", self._bits)
        # In place: a fresh array costs more than the arithmetic in it.
        numbers = self._pairs.take(starts >> 5)
        starts &= 31
        numbers >>= starts
        numbers &= mask_S.take(index)
        numbers += base_S.take(index)
        return numbers

    def end(self) -> None:
        """CorruptBlockError where something is left."""
        if self._at != len(self._symbols):
            raise CorruptBlockError(self._file, f"{self._at} symbols", len(self._symbols))
        if -(-self._bit // 32) * 32 != self._bits:
            raise CorruptBlockError(self._file, f"{self._bit} raw bits", self._bits)


@lru_cache(maxsize=8)
def _numpy_tables(direct: int) -> tuple[np.ndarray, ...]:
    """For each symbol: the bits below it, the number it begins at, and a mask of those bits."""
    octaves = np.arange(_WIDEST + 1)
    widths = np.concatenate([np.zeros(direct, np.int64), octaves])
    bases = np.concatenate([np.arange(direct), direct + (np.int64(1) << octaves) - 1])
    return widths, bases, (np.int64(1) << widths) - 1


def _tables(direct: int, like: Array) -> tuple[Array, ...]:
    if isinstance(like, np.ndarray):
        return _numpy_tables(direct)
    return _torch_tables(direct, like.device)


@lru_cache(maxsize=16)
def _torch_tables(direct: int, device: Any) -> tuple[Array, ...]:
    import torch

    return tuple(torch.as_tensor(table, device=device) for table in _numpy_tables(direct))


def _int64(values: Array) -> Array:
    return values.astype(np.int64) if isinstance(values, np.ndarray) else values.long()
