"""Targets from log-probabilities, and to bytes and back: the functions on SparseTargets.

Shapes: N positions, B sequences, T positions of a sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megadistill.api.arguments import (
    IGNORED,
    Array,
    floats,
    in_callers_words,
    integers,
    labels,
    number,
    rows_of,
    sparse_targets,
    whole,
)
from megadistill.cache import codec
from megadistill.cache.ranking import IdRanking
from megadistill.errors import ArgumentError, TeacherError
from megadistill.targets import SparseMethod, SparseTargets, is_sparse, sparse_method, sparse_names
from megadistill.teacher import select

_MASS = 0.01  # how far from 1 a row's probabilities may sum, as in teacher.select


def select_targets(
    log_probs_NV: Array,
    *,
    method: str,
    keys_N: Array | None = None,
    labels_N: Array | None = None,
    tau: float | None = None,
    draws: int | None = None,
    k: int | None = None,
    p: float | None = None,
    options: Mapping[str, Any] | None = None,
    min_entropy: float | None = None,
    entropy: bool = True,
    nll: bool = True,
    seed: int = 0,
    temperature: float = 1.0,
) -> SparseTargets:
    """Select the sparse targets of N distributions.

    log_probs_NV  natural logarithms at `temperature`, [N, V] or [B, T, V], of any floating dtype;
                  computed in float32
    method        "varopt" (tau, default 0.06), "multinomial" (draws, 50), "topk" (k, 64) or
                  "topp" (p, 0.95, at most k entries, 64). To the last two the true next token is
                  added where labels are given and it is not among the listed. Or a method of
                  another distribution, by its registered name
    options       parameters of a method of another distribution, by name
    keys_N        (sequence number, position) of each position, integers [N, 2] or [B, T, 2], which
                  with `seed` fix the draw. Required by methods that draw, as varopt and
                  multinomial do
    labels_N      true next tokens, integers [N] or [B, T], or None. A position with -100 gets an
                  empty row
    min_entropy   nats, at `temperature`; a position below it gets an empty row
    entropy, nll  whether the targets carry them; nll needs labels
    temperature   recorded in the targets

    Returns N targets: numpy arrays for a numpy array, else tensors on the device of log_probs_NV.
    Raises ArgumentError (a ValueError) for arguments that do not fit.
    """
    chooser = _method(method)
    parameters = _parameters(chooser, tau=tau, draws=draws, k=k, p=p)
    number("temperature", temperature, above=0)
    if min_entropy is not None:
        number("min_entropy", min_entropy, least=0)
    rows_NV, positions = rows_of("log_probs_NV", floats("log_probs_NV", log_probs_NV))
    rows_NV = rows_NV.detach().float()
    device, vocab = rows_NV.device, rows_NV.shape[1]
    if keys_N is None:
        if chooser.needs_keys:
            raise ArgumentError(
                f"keys_N is None, but {method} draws at random: pass (sequence number, position) "
                f"of each position, integers {[*positions, 2]}"
            )
        keys_N2 = torch.zeros(len(rows_NV), 2, dtype=torch.int64, device=device)
    else:
        where: dict[str, Any] = {"positions": positions, "device": device, "beside": "log_probs_NV"}
        keys_N2 = integers("keys_N", keys_N, columns=(2,), **where)
    ids_N = None
    if labels_N is not None:
        ids_N = labels(
            labels_N, vocab=vocab, positions=positions, device=device, beside="log_probs_NV"
        )
    with in_callers_words():
        try:
            chosen = select.select_targets(
                rows_NV,
                method=method,
                keys_N=keys_N2,
                labels_N=ids_N,
                min_entropy=min_entropy,
                entropy=entropy,
                nll=nll,
                seed=seed,
                temperature=temperature,
                options=options,
                **parameters,
            )
        except TeacherError as error:
            raise ArgumentError(_not_a_distribution(rows_NV, ids_N)) from error
    return chosen.numpy() if isinstance(log_probs_NV, np.ndarray) else chosen


def encode_targets(
    targets: SparseTargets, *, vocab_size: int, ranking: IdRanking | None = None
) -> bytes:
    """Encode targets, numpy arrays or tensors, of at most 2^29 positions.

    vocab_size  ids are below it, at most 2^32
    ranking     makes frequent ids cheap, see IdRanking.from_counts; None: ids as they are

    Entries come back in another order. Entropy and nll of a position without targets are dropped;
    those of the others are rounded to a byte. Raises ArgumentError (a ValueError) for targets that
    are not what their method says.
    """
    with in_callers_words():
        vocab_size = whole("vocab_size", vocab_size)
        return codec.encode_targets(
            sparse_targets(targets), vocab_size=vocab_size, ranking=_ranking(ranking, vocab_size)
        )


def decode_targets(
    data: bytes,
    *,
    vocab_size: int,
    ranking: IdRanking | None = None,
    device: torch.device | str | None = None,
) -> SparseTargets:
    """Decode the bytes of `encode_targets`.

    vocab_size, ranking  as they were for encoding
    device               where the tensors are wanted; None: numpy arrays

    Raises CorruptBlockError for bytes that `encode_targets` does not write, ArgumentError (a
    ValueError) for arguments that do not fit.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ArgumentError(f"data is a {type(data).__name__}, expected bytes of encode_targets")
    vocab_size = whole("vocab_size", vocab_size)
    ranking = _ranking(ranking, vocab_size)
    return codec.decode_targets(bytes(data), vocab_size=vocab_size, ranking=ranking, device=device)


def _method(name: str) -> SparseMethod:
    if not isinstance(name, str) or not is_sparse(name):
        raise ArgumentError(f"method is {name!r}, expected one of {', '.join(sparse_names())}")
    with in_callers_words():
        return sparse_method(name)


def _parameters(method: SparseMethod, **given: float | None) -> dict[str, Any]:
    """Returns the parameters that were given, all of which must be the method's own."""
    found = {name: value for name, value in given.items() if value is not None}
    own = ("options",) if method.outside else method.parameters
    for name in found:
        if name not in own:
            raise ArgumentError(
                f"{name} is given, but method {method.name} takes {' and '.join(own)}"
            )
    for name in ("draws", "k"):
        if name in found:
            found[name] = whole(name, found[name])
    for name in ("tau", "p"):
        if name in found:
            number(name, found[name], above=0, most=1)
    return found


def _ranking(ranking: IdRanking | None, vocab_size: int) -> IdRanking | None:
    if ranking is not None and not isinstance(ranking, IdRanking):
        raise ArgumentError(
            f"ranking is a {type(ranking).__name__}, expected IdRanking, for example "
            "IdRanking.from_counts(counts_V)"
        )
    if ranking is not None and len(ranking) != vocab_size:
        raise ArgumentError(
            f"ranking has {len(ranking)} ids, expected {vocab_size}, which is vocab_size"
        )
    return ranking


def _not_a_distribution(log_probs_NV: torch.Tensor, labels_N: torch.Tensor | None) -> str:
    """Returns a message about the first row, of those that are selected from, that is none."""
    sum_N = log_probs_NV.exp().double().sum(1)
    bad_N = ~((sum_N - 1).abs() < _MASS)  # nan compares false
    if labels_N is not None:
        bad_N &= labels_N != IGNORED
    row = int(bad_N.nonzero()[0])
    row_V, found = log_probs_NV[row].double(), float(sum_N[row])
    where = f"log_probs_NV, row {row}"
    if not row_V.isfinite().any() or row_V.isnan().any() or (row_V == math.inf).any():
        return f"{where}: holds nan or inf, expected natural logarithms of probabilities"
    if (row_V >= 0).all() and abs(float(row_V.sum()) - 1) < _MASS:
        return f"{where}: holds probabilities, expected their logarithms: pass log_probs_NV.log()"
    return (
        f"{where}: exp() of it sums to {found:.4g}, expected 1: logits are normalised by "
        "torch.log_softmax(logits.float(), -1)"
    )
