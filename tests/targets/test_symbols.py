"""Whole numbers to symbols and bits, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.errors import CorruptBlockError
from megadistill.targets.streams.ragged_rows import gaps, rising
from megadistill.targets.streams.symbols import (
    BYTES,
    LEVELS,
    RANKS,
    SymbolReader,
    SymbolWriter,
    inflate,
)

NUMBERS = {
    RANKS: st.integers(0, (1 << 32) - 1) | st.integers(0, 40),
    LEVELS: st.integers(0, (1 << 32) - 1) | st.integers(180, 220) | st.integers(0, 9),
    BYTES: st.integers(0, 255),
}


def reader_of(writer: SymbolWriter) -> SymbolReader:
    count = sum(map(len, writer.streams))
    symbols, rest = inflate(writer.symbols() + writer.bits(), count, file="here")
    words = np.append(np.frombuffer(rest, "<u4").astype(np.int64), 0)
    return SymbolReader(np.frombuffer(symbols, np.uint8), words, file="here")


@given(
    st.lists(st.sampled_from(list(NUMBERS)), max_size=5).flatmap(
        lambda kinds: st.tuples(*(st.tuples(st.just(k), st.lists(NUMBERS[k])) for k in kinds))
    )
)
@settings(max_examples=300)
def test_streams_come_back(streams: tuple) -> None:
    writer = SymbolWriter()
    for direct, numbers in streams:
        writer.put(np.array(numbers, np.int64), direct)
    reader = reader_of(writer)
    for direct, numbers in streams:
        assert reader.take(len(numbers), direct).tolist() == numbers
    reader.end()


@given(st.lists(st.sets(st.integers(0, (1 << 32) - 1), max_size=9)))
def test_gaps_come_back_as_the_rising_numbers_they_were(rows: list[set[int]]) -> None:
    counts = np.array([len(row) for row in rows], np.int64)
    numbers = np.array([n for row in rows for n in sorted(row)], np.int64)
    found = gaps(numbers, counts)
    assert (found >= 0).all()
    assert rising(found, counts, len(numbers)).tolist() == numbers.tolist()


def test_streams_cost_what_their_entropy_says() -> None:
    """A deflate block for each stream: one code for both would cost 30 % more here."""
    rng = np.random.default_rng(0)
    streams = [rng.geometric(0.4, 4000), 100 + rng.integers(0, 64, 4000)]
    writer = SymbolWriter()
    entropy = 0.0
    for numbers in streams:
        writer.put(numbers, BYTES)
        share = np.bincount(numbers)[np.bincount(numbers) > 0] / len(numbers)
        entropy -= len(numbers) * (share * np.log2(share)).sum() / 8
    assert len(writer.symbols()) < 1.03 * entropy


def test_a_reader_gives_no_more_than_there_is() -> None:
    writer = SymbolWriter()
    writer.put(np.arange(1000), RANKS)
    with pytest.raises(CorruptBlockError, match="1001 symbols"):
        reader_of(writer).take(1001, RANKS)
    with pytest.raises(CorruptBlockError, match="raw bits"):
        SymbolReader(np.full(9, 30, np.uint8), np.zeros(3, np.int64), file="x").take(9, RANKS)
    with pytest.raises(CorruptBlockError, match="symbols up to 32"):
        SymbolReader(np.full(9, 99, np.uint8), np.zeros(3, np.int64), file="x").take(9, RANKS)
    reader = reader_of(writer)
    reader.take(999, RANKS)
    with pytest.raises(CorruptBlockError, match="999 symbols"):
        reader.end()


def test_words_of_bits_that_nothing_reads_are_found() -> None:
    writer = SymbolWriter()
    writer.put(np.arange(1000), RANKS)
    symbols, rest = inflate(writer.symbols() + writer.bits(), 1000, file="here")
    words = np.append(np.frombuffer(rest, "<u4").astype(np.int64), [0, 0])  # one too many
    reader = SymbolReader(np.frombuffer(symbols, np.uint8), words, file="here")
    assert reader.take(1000, RANKS).tolist() == list(range(1000))
    with pytest.raises(CorruptBlockError, match="raw bits"):
        reader.end()
