"""Select: a distribution over the vocabulary becomes a short list of (token id, weight).

Stands between the teacher's head, which gives log-probabilities in chunks of positions, and the
cache. targets/distributions.py answers what is asked of a rank's slice of the vocabulary,
targets/methods/ has the methods; here is what they share: which positions are selected at all,
entropy, nll, and the check that what came is a distribution.

The random start of a position is a function of (seed, purpose, sequence number, position) and of
nothing else (counter_rng.py), and everything that decides is an integer: so every slicing of the
vocabulary selects the same.

Shape letters: N positions, V vocabulary (here: this rank's slice), M draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from megadistill.config import TargetsConfig
from megadistill.errors import TeacherError
from megadistill.targets import SparseTargets, is_sparse, sparse_method, sparse_names
from megadistill.targets.distributions import FIXED_POINT, Distributions, Positions, VocabularySlice
from megadistill.targets.sparse import spread


def select_targets(
    log_probs_NV: torch.Tensor,
    *,
    method: str,
    keys_N: torch.Tensor,
    labels_N: torch.Tensor | None = None,
    tau: float = 0.06,
    draws: int = 50,
    k: int = 64,
    p: float = 0.95,
    options: Mapping[str, Any] | None = None,
    min_entropy: float | None = None,
    entropy: bool = True,
    nll: bool = True,
    seed: int = 0,
    temperature: float = 1.0,
    vocabulary: VocabularySlice | None = None,
) -> SparseTargets:
    """The sparse targets of N distributions.

    log_probs_NV  float32 [N, V], natural logarithms, at `temperature`; under tensor parallelism
                  this rank's slice of the vocabulary
    method        "varopt" (takes tau), "multinomial" (draws), "topk" (k) or "topp" (p, at most k
                  entries); to the last two the ground truth is added where labels are given and
                  it is not listed; or a method of another distribution
    options       parameters of a method of another distribution, by name
    keys_N        int64 [N, 2]: (sequence number, position), which with `seed` fix the draw
    labels_N      int64 [N] true next tokens, or None; a position with -100 gets an empty row
    min_entropy   nats, at `temperature`; a position below it gets an empty row
    entropy, nll  whether the targets carry them; nll needs labels
    temperature   recorded in the targets: what log_probs_NV was computed at

    Returns targets on the device of log_probs_NV, equal on all ranks of the group. Raises
    TeacherError where a log-probability is nan or +inf, naming sequence and position.
    """
    vocabulary = vocabulary or VocabularySlice(0, log_probs_NV.shape[1])
    if log_probs_NV.dtype != torch.float32:
        raise ValueError(f"log_probs_NV is {log_probs_NV.dtype}, expected torch.float32")
    if keys_N.shape != (len(log_probs_NV), 2):
        raise ValueError(f"keys_N is {tuple(keys_N.shape)}, expected ({len(log_probs_NV)}, 2)")
    _check_parameters(method, tau=tau, draws=draws, k=k, p=p)
    chooser = sparse_method(method)
    values = chooser.chosen({"tau": tau, "draws": draws, "k": k, "p": p}, options or {})
    kept = []  # which of the positions, and then which of those
    if labels_N is not None and (labels_N == -100).any():
        kept.append(labels_N != -100)
        log_probs_NV, keys_N, labels_N = (x[kept[0]] for x in (log_probs_NV, keys_N, labels_N))
    positions = _measure(
        log_probs_NV, vocabulary, keys_N, labels_N, entropy=entropy or min_entropy is not None
    )
    if min_entropy is not None:
        kept.append(positions.entropy_N >= min_entropy)
        positions = positions.rows(kept[-1])
    chosen = chooser.select(
        positions,
        values,
        seed=seed,
        temperature=temperature,
        entropy=positions.entropy_N if entropy else None,
        nll=-positions.truth_N if nll and labels_N is not None else None,
    )
    for keep_N in reversed(kept):
        chosen = spread(chosen, keep_N)
    return chosen


def selection(config: TargetsConfig) -> dict[str, Any]:
    """The keyword arguments of `select_targets` that a configuration decides, less temperature."""
    method = sparse_method(config.method)
    names = ("min_entropy", "entropy", "nll", "method", "seed")
    return method.record(method.read(config)) | {name: getattr(config, name) for name in names}


def _check_parameters(method: str, *, tau: float, draws: int, k: int, p: float) -> None:
    if not is_sparse(method):
        raise ValueError(f"method is {method!r}, expected one of {', '.join(sparse_names())}")
    for name, value, most in (("tau", tau, 1), ("draws", draws, None), ("k", k, None), ("p", p, 1)):
        if not (value > 0 and (most is None or value <= most)):
            bound = "more than 0" if most is None else f"more than 0 and at most {most}"
            raise ValueError(f"{name} is {value}, expected {bound}")


def _measure(
    log_probs_NV: torch.Tensor,
    vocabulary: VocabularySlice,
    keys_N: torch.Tensor,
    labels_N: torch.Tensor | None,
    *,
    entropy: bool,
) -> Positions:
    """Probabilities in fixed point; the true ids' log-probabilities, and the entropies in nats."""
    # A float32 times a power of two is exact, and so is what int64 keeps of it: units of 2^-40.
    scaled_NV = log_probs_NV.exp().mul_(FIXED_POINT)
    _require_distributions(scaled_NV, vocabulary, keys_N)
    return Positions(
        entropy_N=_entropy(scaled_NV, log_probs_NV, vocabulary) if entropy else None,
        truth_N=None if labels_N is None else _log_prob_of(labels_N, log_probs_NV, vocabulary),
        distributions=Distributions(log_probs_NV, scaled_NV.to(torch.int64), vocabulary),
        keys_N=keys_N,
        labels_N=labels_N,
    )


def _entropy(
    scaled_NV: torch.Tensor, log_probs_NV: torch.Tensor, vocabulary: VocabularySlice
) -> torch.Tensor:
    """float32 [N]. Summed as integers, so that every slicing has the same. 0 * log 0 is 0."""
    terms_NV = log_probs_NV.clamp_min(-200).mul_(scaled_NV).to(torch.int64)
    sum_N = vocabulary.gather(terms_NV.sum(1)).sum(0)
    return (-sum_N.double() / FIXED_POINT).float()


def _require_distributions(
    scaled_NV: torch.Tensor, vocabulary: VocabularySlice, keys_N: torch.Tensor
) -> None:
    """TeacherError where a position's probabilities do not sum to 1: nan, inf, not a softmax."""
    sum_N = vocabulary.gather(scaled_NV.sum(1)).sum(0) / FIXED_POINT
    bad_N = ~((sum_N - 1).abs() < 0.01)  # nan compares false, too
    if bad_N.any():
        sequence, position = keys_N[bad_N][0].tolist()
        raise TeacherError(
            f"sequence {sequence}, position {position}: the teacher's probabilities sum to "
            f"{float(sum_N[bad_N][0])}, expected 1: check the weights, or run the teacher in "
            "teacher.dtype=float32"
        )


def _log_prob_of(
    ids_N: torch.Tensor, log_probs_NV: torch.Tensor, vocabulary: VocabularySlice
) -> torch.Tensor:
    """float32 [N]: the log-probability of one id a position, wherever its slice is."""
    local_N = ids_N - vocabulary.first
    here_N = (local_N >= 0) & (local_N < vocabulary.size)
    found_N = log_probs_NV.gather(1, local_N.clamp(0, vocabulary.size - 1)[:, None])[:, 0]
    return vocabulary.gather(found_N.masked_fill(~here_N, -math.inf)).amax(0)
