"""The codec: sparse targets of one sequence to bytes, and back. No loop over positions.

    uint8 version | uint8 method | uint8 flags | uint8 0 | uint32 N positions | uint32 S symbols
    uint32 parameter                        varopt: the ratio, multinomial: the draws, else 0
    float64 temperature                     where flagged: other than 1
    S deflated symbols | raw bits           the streams, see targets/streams and targets/methods

The streams, in order: the method's own; then for the positions that have targets, where flagged,
entropy and nll in a byte each (quantizer.py). Positions without targets cost some 2 bits.

topk, topp  ids come back exactly; weights as the nearest of levels 1/16 of an octave apart, which
            costs 5e-5 nats of KL
multinomial ids and weights come back exactly
varopt      weights are rounded to multiples of 1/128 at random and without bias; an entry that is
            rounded to 0 is not kept

Bytes per token at 2,048 positions a sequence, without entropy and nll (tools/bench.py storage):
varopt at the variance of 50 multinomial draws 9.1 (a teacher of 1.9 nats, 4,096 ids) to 10.1
(262,144 ids), where random sampling distillation takes 36 and 29; top-64 106 to 139. Each is within
1.5 % of the static entropy of its streams.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

from megadistill.cache.codec.validity import NonFiniteError, check_targets
from megadistill.cache.quantizer import LEVELS, NONE, to_codes
from megadistill.cache.ranking import IdRanking
from megadistill.errors import CorruptBlockError
from megadistill.targets import SparseMethod, SparseTargets, sparse_method
from megadistill.targets.method import method_with_byte
from megadistill.targets.streams.ragged_rows import like, offsets, zeros
from megadistill.targets.streams.symbols import BYTES, SymbolReader, SymbolWriter, inflate

__all__ = ["NonFiniteError", "content", "decode_targets", "encode_targets", "streams_of"]

VERSION = 1
_HEADER = struct.Struct("<BBBBIII")
_TEMPERATURE = struct.Struct("<d")
_ENTROPY, _NLL, _TRUTH, _WARM = 1, 2, 4, 8


def encode_targets(
    targets: SparseTargets, *, vocab_size: int, ranking: IdRanking | None = None
) -> bytes:
    """The bytes of targets, numpy or torch, at most 2^29 positions.

    vocab_size  ids are below it, at most 2^32
    ranking     of ids, which makes frequent ones cheap; None: ids as they are
    Entries come back in another order: the heaviest head first, then the other heads, then the
    sampled ones, each by rank. Entropy and nll of a position without targets are dropped.
    Raises NonFiniteError (a ValueError) for values that are not finite or negative, ValueError for
    targets that are not what their method says.
    """
    _check_ranking(ranking, vocab_size)
    t = targets.numpy()
    check_targets(t, vocab_size)
    writer, parameter = _put(t, ranking)
    flags = (
        (_ENTROPY if t.entropy is not None else 0)
        | (_NLL if t.nll is not None else 0)
        | (_TRUTH if t.truth_added is not None else 0)
        | (_WARM if t.temperature != 1 else 0)
    )
    symbols = sum(map(len, writer.streams))
    method = sparse_method(t.method).byte
    return b"".join(
        (
            _HEADER.pack(VERSION, method, flags, 0, len(t), symbols, parameter),
            _TEMPERATURE.pack(t.temperature) if flags & _WARM else b"",
            writer.symbols(),
            writer.bits(),
        )
    )


def streams_of(t: SparseTargets, *, ranking: IdRanking | None = None) -> tuple[list[bytes], int]:
    """(the symbols of each stream, how many bytes of raw bits): what `encode_targets` packs."""
    writer, _ = _put(t.numpy(), ranking)
    return writer.streams, len(writer.bits())


def _put(t: SparseTargets, ranking: IdRanking | None) -> tuple[SymbolWriter, int]:
    writer = SymbolWriter()
    ranks_E = t.ids.astype(np.int64) if ranking is None else ranking.ranks[t.ids]
    parameter = sparse_method(t.method).put(writer, t, ranks_E)
    has_N = t.counts > 0
    for values in (t.entropy, t.nll):
        if values is not None:
            writer.put(to_codes(values[has_N]), BYTES)
    return writer, parameter


def decode_targets(
    data: bytes,
    *,
    vocab_size: int,
    ranking: IdRanking | None = None,
    file: str = "targets",
    device: Any = None,
) -> SparseTargets:
    """The targets in `data`: numpy arrays, or torch tensors where a device is given.

    file    what to call the place in the message of a CorruptBlockError, raised for bytes that
            `encode_targets` does not write
    device  torch's; the packed streams travel there, and are taken apart there
    """
    _check_ranking(ranking, vocab_size)
    head, symbols, words = _unpack(data, file)
    if device is not None:
        import torch

        symbols, words = (torch.as_tensor(s, device=device) for s in (symbols, words))
    reader = SymbolReader(symbols, words, file=file)
    truth = bool(head.flags & _TRUTH)
    fields = head.method.take(reader, head.positions, head.parameter, truth, file)
    ranks_E, counts_N = fields.pop("ranks"), fields.pop("counts")
    if len(ranks_E) and int(ranks_E.max()) >= vocab_size:
        raise CorruptBlockError(file, f"ids below {vocab_size}", int(ranks_E.max()))
    has_N = counts_N > 0
    for name, flag in (("entropy", _ENTROPY), ("nll", _NLL)):
        if head.flags & flag:
            codes_N = zeros(len(counts_N), counts_N) + NONE
            codes_N[has_N] = reader.take(int(has_N.sum()), BYTES)
            fields[name] = like(LEVELS, codes_N)[codes_N]
    reader.end()
    return SparseTargets(
        offsets=offsets(counts_N),
        ids=ranks_E if ranking is None else ranking.ids_like(ranks_E).take(ranks_E),
        method=head.method.name,
        temperature=head.temperature,
        **fields,
    )


def content(data: bytes, *, file: str = "targets") -> bytes:
    """Returns `data` before it was deflated: the same with every version of zlib."""
    head, symbols, words = _unpack(data, file)
    return data[: head.size] + symbols.tobytes() + words[:-1].astype("<u4").tobytes()


class _Head(NamedTuple):
    size: int
    method: SparseMethod
    flags: int
    positions: int
    parameter: int
    temperature: float


def _unpack(data: bytes, file: str) -> tuple[_Head, Any, Any]:
    """(header, symbols uint8, words int64 with a zero word last)."""
    if len(data) < _HEADER.size:
        raise CorruptBlockError(file, f"at least {_HEADER.size} bytes of targets", len(data))
    version, byte, flags, zero, positions, count, parameter = _HEADER.unpack_from(data)
    if version != VERSION:
        raise CorruptBlockError(file, f"version {VERSION} of the targets codec", version)
    size, temperature = _HEADER.size, 1.0
    if flags & _WARM:
        size += _TEMPERATURE.size
        if len(data) < size:
            raise CorruptBlockError(file, f"at least {size} bytes of targets", len(data))
        (temperature,) = _TEMPERATURE.unpack_from(data, _HEADER.size)
    method = method_with_byte(byte)
    if (
        method is None
        or flags > 15
        or zero
        or (flags & _TRUTH and not method.adds_truth)
        or not 0 < temperature < float("inf")
    ):
        raise CorruptBlockError(file, "a header of targets", data[:size].hex())
    symbols, rest = inflate(data[size:], count, file=file)
    if len(rest) % 4:
        raise CorruptBlockError(file, "raw bits in words of 4 bytes", f"{len(rest)} bytes")
    words = np.zeros(len(rest) // 4 + 1, np.int64)
    words[:-1] = np.frombuffer(rest, "<u4")
    head = _Head(size, method, flags, positions, parameter, temperature)
    return head, np.frombuffer(bytearray(symbols), np.uint8), words


def _check_ranking(ranking: IdRanking | None, vocab_size: int) -> None:
    if not 0 < vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size is {vocab_size}, expected 1 to 2^32")
    if ranking is not None and len(ranking) != vocab_size:
        raise ValueError(f"ranking has {len(ranking)} ids, expected {vocab_size}")
