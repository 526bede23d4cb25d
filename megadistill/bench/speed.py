"""Positions a second that one core encodes and decodes, and how many H200s that feeds.

An H200 trains a student of 1B parameters at 65,000 tokens a second, at 40 % of its peak.

Shape letters: N positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from megadistill.cache.codec import decode_targets, encode_targets
from megadistill.teacher.select import select_targets

TOKENS_A_SECOND = 65_000
PARAMETERS: dict[str, dict[str, Any]] = {
    "varopt": {"tau": 0.08},
    "multinomial": {"draws": 50},
    "topk": {"k": 64},
    "topp": {"k": 64, "p": 0.95},
}


def speed(distribution: Any, *, seconds: float = 2.0) -> list[dict[str, Any]]:
    """A row for each method, on the first chunks of a distribution as one sequence."""
    rows = []
    for method, parameters in PARAMETERS.items():
        targets = _select(distribution, method, parameters)
        options = {"vocab_size": distribution.vocab_size, "ranking": distribution.ranking}
        data = encode_targets(targets, **options)
        encoded = len(targets) / _best(lambda: encode_targets(targets, **options), seconds)  # noqa: B023
        decoded = len(targets) / _best(lambda: decode_targets(data, **options), seconds)  # noqa: B023
        rows.append(
            {
                "method": method,
                **parameters,
                "positions": len(targets),
                "entries": len(targets.ids) / len(targets),
                "encoded_a_second": encoded,
                "decoded_a_second": decoded,
                "h200s_fed": decoded / TOKENS_A_SECOND,
            }
        )
    return rows


def _select(distribution: Any, method: str, parameters: dict[str, Any]) -> Any:
    from megadistill.targets import concatenate

    parts, done = [], 0
    for log_probs_CV in distribution:
        rows = torch.arange(done, done + len(log_probs_CV))
        keys_N2 = torch.stack([rows * 0, rows], 1)
        parts.append(select_targets(log_probs_CV, method=method, keys_N=keys_N2, **parameters))
        done += len(rows)
    return concatenate([part.numpy() for part in parts])


def _best(call: Callable[[], Any], seconds: float) -> float:
    """The shortest of many times: what the machine can do when nothing else runs."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
