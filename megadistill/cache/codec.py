"""The codec: sparse targets of one sequence to bytes, and back without a loss.

Version 1 is plain: streams one after another, all little-endian.

    header    uint8 version | method | flags | bytes a count | bytes an id | 3 zero bytes
              float64 temperature | uint32 N positions | uint32 E entries
    counts    uint8, 16 or 32 [N]      entries of each position
    heads     the same [N]             varopt only: how many of them are heads
    ids       2, 3 or 4 bytes [E]
    weights   float32                  topk, topp, multinomial: [E]. varopt: those of the heads,
                                       then one for each position with sampled entries, which share
                                       it, so that the tail's weights cost 4 bytes a position
    tail      float32 [N]              topk, topp only
    truth     1 bit [N]                where flagged: the last entry is the added ground truth
    entropy   uint8 [N]                where flagged: level codes, see levels.py
    nll       uint8 [N]                where flagged: level codes

Everything but entropy and nll comes back bit for bit, and equal targets have equal bytes. Nothing
loops over positions.

Shape letters: N positions, E entries of all positions.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from megadistill.cache.levels import from_codes, to_codes
from megadistill.errors import CorruptBlockError
from megadistill.targets import METHODS, SAMPLED, SparseTargets

VERSION = 1
_HEADER = struct.Struct("<BBBBB3xdII")
_ENTROPY, _NLL, _TRUTH = 1, 2, 4


class NonFiniteError(ValueError):
    """Targets hold a value that is no probability, entropy or nll."""

    def __init__(self, position: int, name: str, value: float) -> None:
        super().__init__(f"position {position}: {name} is {value}")
        self.position, self.name, self.value = position, name, value


def encode_targets(targets: SparseTargets, *, vocab_size: int, codec: object = None) -> bytes:
    """The bytes of targets, numpy or torch, at most 2^32 positions and entries.

    vocab_size  ids are below it; decides the bytes an id takes
    codec       None: ids as they are
    Raises NonFiniteError (a ValueError) for values that are not finite or negative, ValueError for
    targets that are not what their method says.
    """
    _known(codec)
    id_bytes = _id_bytes(vocab_size)
    t = targets.numpy()
    counts = np.diff(t.offsets).astype(np.int64)
    _check(t, counts, vocab_size)
    count_bytes = next(b for b in (1, 2, 4) if counts.max(initial=0) < 1 << (8 * b))
    flags = (
        (_ENTROPY if t.entropy is not None else 0)
        | (_NLL if t.nll is not None else 0)
        | (_TRUTH if t.truth_added is not None else 0)
    )
    method = METHODS.index(t.method)
    parts = [
        _HEADER.pack(
            VERSION, method, flags, count_bytes, id_bytes, t.temperature, len(counts), len(t.ids)
        ),
        counts.astype(f"<u{count_bytes}").tobytes(),
    ]
    heads = np.zeros(0, np.int64) if t.heads is None else t.heads
    if t.method == "varopt":
        parts.append(heads.astype(f"<u{count_bytes}").tobytes())
    parts.append(np.ascontiguousarray(_bytes_of(t.ids)[:, :id_bytes]).tobytes())
    if t.method == "varopt":
        is_head, shared = _split(t.offsets, counts, heads)
        parts += [t.weights[is_head].astype("<f4").tobytes(), t.weights[shared].tobytes()]
    else:
        parts.append(t.weights.astype("<f4").tobytes())
    if t.method not in SAMPLED:
        parts.append(t.tail.astype("<f4").tobytes())
    if t.truth_added is not None:
        parts.append(np.packbits(t.truth_added.astype(bool), bitorder="little").tobytes())
    parts += [to_codes(v).tobytes() for v in (t.entropy, t.nll) if v is not None]
    return b"".join(parts)


def decode_targets(
    data: bytes, *, vocab_size: int, codec: object = None, file: str = "targets"
) -> SparseTargets:
    """The targets in `data`, as numpy arrays.

    file  what to call the place in the message of a CorruptBlockError, raised for bytes that
          `encode_targets` does not write
    """
    _known(codec)
    if len(data) < _HEADER.size:
        raise CorruptBlockError(file, f"at least {_HEADER.size} bytes of targets", len(data))
    version, method_code, flags, count_bytes, id_bytes, temperature, n, e = _HEADER.unpack_from(
        data
    )
    if version != VERSION:
        raise CorruptBlockError(file, f"version {VERSION} of the targets codec", version)
    if (
        method_code >= len(METHODS)
        or flags > 7
        or count_bytes not in (1, 2, 4)
        or id_bytes != _id_bytes(vocab_size)
        or not 0 < temperature < float("inf")
    ):
        raise CorruptBlockError(file, "a header of targets", data[: _HEADER.size].hex())
    method = METHODS[method_code]
    streams = _Streams(data, _HEADER.size, file)
    counts = streams.take(f"<u{count_bytes}", n).astype(np.int64)
    heads = streams.take(f"<u{count_bytes}", n).astype(np.int64) if method == "varopt" else None
    if counts.sum() != e or (heads is not None and (heads > counts).any()):
        raise CorruptBlockError(file, f"counts that add up to {e}", int(counts.sum()))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    ids = np.zeros((e, 8), np.uint8)
    ids[:, :id_bytes] = streams.take("u1", e * id_bytes).reshape(e, id_bytes)
    ids = ids.view("<i8").reshape(e)
    if e and ids.max() >= vocab_size:
        raise CorruptBlockError(file, f"ids below {vocab_size}", int(ids.max()))
    weights = np.empty(e, np.float32)
    if heads is not None:
        is_head, _ = _split(offsets, counts, heads)
        weights[is_head] = streams.take("<f4", int(heads.sum()))
        sampled = counts - heads
        weights[~is_head] = np.repeat(
            streams.take("<f4", int((sampled > 0).sum())), sampled[sampled > 0]
        )
    else:
        weights[:] = streams.take("<f4", e)
    tail = np.zeros(n, np.float32) if method in SAMPLED else streams.take("<f4", n).copy()
    truth = None
    if flags & _TRUTH:
        bits = streams.take("u1", -(-n // 8))
        truth = np.unpackbits(bits, count=n, bitorder="little").astype(bool)
    entropy = from_codes(streams.take("u1", n)) if flags & _ENTROPY else None
    nll = from_codes(streams.take("u1", n)) if flags & _NLL else None
    streams.end()
    for values in (weights, tail):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise CorruptBlockError(file, "probabilities", "other numbers")
    return SparseTargets(
        offsets=offsets,
        ids=ids,
        weights=weights,
        tail=tail,
        method=method,
        temperature=temperature,
        entropy=entropy,
        nll=nll,
        heads=heads,
        truth_added=truth,
    )


@dataclass
class _Streams:
    """The streams of one sequence, taken one after another."""

    data: bytes
    at: int
    file: str

    def take(self, dtype: str, count: int) -> np.ndarray:
        kind = np.dtype(dtype)
        stop = self.at + count * kind.itemsize
        if stop > len(self.data):  # before anything of that size is allocated
            raise CorruptBlockError(self.file, f"{stop} bytes of targets", len(self.data))
        values = np.frombuffer(self.data, kind, count, self.at)
        self.at = stop
        return values

    def end(self) -> None:
        if self.at != len(self.data):
            raise CorruptBlockError(self.file, f"{self.at} bytes of targets", len(self.data))


def _split(
    offsets: np.ndarray, counts: np.ndarray, heads: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(bool [E]: the entry is a head; int64: the first sampled entry of each row that has one)."""
    place = np.arange(offsets[-1] - offsets[0]) - np.repeat(offsets[:-1] - offsets[0], counts)
    is_head = place < np.repeat(heads, counts)
    return is_head, (offsets[:-1] - offsets[0] + heads)[counts > heads]


def _bytes_of(ids: np.ndarray) -> np.ndarray:
    return ids.astype("<i8").view(np.uint8).reshape(len(ids), 8)


def _id_bytes(vocab_size: int) -> int:
    if not 0 < vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size is {vocab_size}, expected 1 to 2^32")
    return next(b for b in (2, 3, 4) if vocab_size <= 1 << (8 * b))


def _known(codec: object) -> None:
    if codec is not None:
        raise ValueError(f"codec {codec!r} is not known, expected None")


def _check(t: SparseTargets, counts: np.ndarray, vocab_size: int) -> None:
    if t.offsets[0] != 0 or t.offsets[-1] != len(t.ids) or (counts < 0).any():
        raise ValueError("offsets must rise from 0 to the number of ids")
    if len(t.ids) and (t.ids.min() < 0 or t.ids.max() >= vocab_size):
        low, high = t.ids.min(), t.ids.max()
        raise ValueError(f"ids go from {low} to {high}, expected 0 to {vocab_size - 1}")
    rows = np.repeat(np.arange(len(counts)), counts)
    _finite(t.weights, rows, "weight")
    _finite(t.tail, None, "tail")
    if t.entropy is not None:
        _finite(np.where(counts > 0, t.entropy, 0), None, "entropy")
    if t.nll is not None:
        _finite(np.where(np.isnan(t.nll), 0, t.nll), None, "nll")
    if t.truth_added is not None and t.method in SAMPLED:
        raise ValueError(f"{t.method} targets have no added ground truth")
    if t.method in SAMPLED and t.tail.any():
        raise ValueError(f"{t.method} targets leave nothing out, found a tail")
    if (t.heads is not None) != (t.method == "varopt"):
        raise ValueError("heads belong to varopt targets, and to no others")
    if t.heads is not None:
        if (t.heads < 0).any() or (t.heads > counts).any():
            raise ValueError("heads must be between 0 and the entries of their position")
        is_head, shared = _split(t.offsets, counts, t.heads)
        sampled = (counts - t.heads)[counts > t.heads]
        if not np.array_equal(t.weights[~is_head], np.repeat(t.weights[shared], sampled)):
            raise ValueError("the sampled entries of a position must share one weight")


def _finite(values: np.ndarray, rows: np.ndarray | None, name: str) -> None:
    bad = ~(np.isfinite(values) & (values >= 0))
    # A float32 entropy or nll may round to just below zero; that is no error of the teacher's.
    if name in ("entropy", "nll"):
        bad &= ~(np.abs(values) < 1e-3)
    if bad.any():
        first = int(np.argmax(bad))
        position = first if rows is None else int(rows[first])
        raise NonFiniteError(position, name, float(values[first]))
