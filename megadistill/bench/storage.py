"""Bytes per token: what the codec takes, beside the entropy of its streams and other formats.

varopt at the variance of 50 multinomial draws, against random sampling distillation's 3 bytes for
each different id; top-64 against float16 + uint16 + a byte through zstd-3, and against ids of
ceil(log2 V) bits with 16-bit values. All from the same log-probabilities.

Shape letters: N positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import zstd

from megadistill.bench.variance import Variances
from megadistill.cache.codec import decode_targets, encode_targets, streams_of
from megadistill.targets import SparseTargets, concatenate
from megadistill.teacher.select import select_targets

DRAWS, K = 50, 64
Row = dict[str, Any]


def storage(distribution: Any, *, seq_len: int) -> tuple[Row, Row]:
    """(the figures of varopt, those of top-64), bytes per token; sequences of `seq_len`."""
    variances = Variances(distribution)
    tau = variances.tau(variances.multinomial(DRAWS))
    chosen: dict[str, list[SparseTargets]] = {"varopt": [], "multinomial": [], "topk": []}
    done = 0
    for log_probs_CV in distribution:
        rows = torch.arange(done, done + len(log_probs_CV))
        done += len(rows)
        keys_N2 = torch.stack([rows // seq_len, rows % seq_len], 1)
        for method, found in chosen.items():
            targets = select_targets(
                log_probs_CV, method=method, keys_N=keys_N2, tau=tau, k=K, draws=DRAWS
            )
            found.append(targets.numpy())
    varopt, drawn, listed = (_bare(concatenate(parts)) for parts in chosen.values())
    common = {"data": distribution.name, "seq_len": seq_len}
    vocab_size, ranking = distribution.vocab_size, distribution.ranking
    rival = 3 * len(drawn.ids) / done
    size = _coded(varopt, seq_len, vocab_size, ranking)
    first = {
        **common,
        "method": "varopt",
        "tau": tau,
        "bytes": size,
        "entries": len(varopt.ids) / done,
        "entropy_of_streams": _entropy(varopt, seq_len, ranking),
        "random_sampling": rival,
        "ratio": size / rival,
        "variance": variances.varopt(tau),
        "variance_of_draws": variances.multinomial(DRAWS),
        "rounding_share": variances.varopt(tau) / variances.varopt(tau, rounded=False) - 1,
        "variance_ratio_at_equal_entries": variances.multinomial(DRAWS)
        / variances.varopt(variances.tau_of_entries(len(drawn.ids) / done)),
    }
    size = _coded(listed, seq_len, vocab_size, ranking)
    zstd_3, packed = _megatron(listed, seq_len), K * (math.ceil(math.log2(vocab_size)) + 16) / 8
    second = {
        **common,
        "method": "topk",
        "bytes": size,
        "entropy_of_streams": _entropy(listed, seq_len, ranking),
        "zstd": zstd_3,
        "ratio_zstd": size / zstd_3,
        "packed": packed,
        "ratio_packed": size / packed,
        **_errors(listed, vocab_size, ranking),
    }
    return first, second


def _bare(t: SparseTargets) -> SparseTargets:
    """Without entropy and nll, which are optional and two bytes more."""
    import dataclasses

    return dataclasses.replace(t, entropy=None, nll=None)


def _sequences(t: SparseTargets, seq_len: int) -> Iterator[SparseTargets]:
    for start in range(0, len(t), seq_len):
        yield t.rows(start, min(start + seq_len, len(t)))


def _coded(t: SparseTargets, seq_len: int, vocab_size: int, ranking: Any) -> float:
    parts = (
        encode_targets(part, vocab_size=vocab_size, ranking=ranking)
        for part in _sequences(t, seq_len)
    )
    return sum(map(len, parts)) / len(t)


def _entropy(t: SparseTargets, seq_len: int, ranking: Any) -> float:
    """Bytes per token by the static entropy of each stream's symbols, and the raw bits."""
    streams: list[list[bytes]] = []
    bits = 0.0
    for part in _sequences(t, seq_len):
        symbols, raw = streams_of(part, ranking=ranking)
        bits += 8 * raw
        streams += [[] for _ in range(len(symbols) - len(streams))]
        for stream, found in zip(streams, symbols, strict=False):
            stream.append(found)
    for stream in streams:
        counts = np.bincount(np.frombuffer(b"".join(stream), np.uint8))
        share = counts[counts > 0] / counts.sum()
        bits -= int(counts.sum()) * float((share * np.log2(share)).sum())
    return bits / 8 / len(t)


def _megatron(t: SparseTargets, seq_len: int) -> float:
    """float16 values, uint16 ids and a byte for their 17th bit and up, through zstd-3."""
    size = 0
    for part in _sequences(t, seq_len):
        with np.errstate(divide="ignore"):
            values = np.log(part.weights).astype("<f2").tobytes()
        low, high = (part.ids & 0xFFFF).astype("<u2"), (part.ids >> 16).astype("u1")
        size += len(zstd.compress(values + low.tobytes() + high.tobytes(), 3))
    return size / len(t)


def _errors(t: SparseTargets, vocab_size: int, ranking: Any) -> Row:
    """Computes decoding errors: KL over list and tail, and the largest of a log-probability."""
    data = encode_targets(t, vocab_size=vocab_size, ranking=ranking)
    back = decode_targets(data, vocab_size=vocab_size, ranking=ranking)
    assert np.array_equal(back.ids, t.ids)
    p, q = t.weights.astype(np.float64), back.weights.astype(np.float64)
    some = (p > 0) & (q > 0)
    kl = float((p[some] * np.log(p[some] / q[some])).sum())
    tail, back_tail = t.tail.astype(np.float64), back.tail.astype(np.float64)
    some_N = (tail > 0) & (back_tail > 0)
    kl += float((tail[some_N] * np.log(tail[some_N] / back_tail[some_N])).sum())
    return {"kl": kl / len(t), "log_prob_error": float(np.abs(np.log(p[some] / q[some])).max())}
