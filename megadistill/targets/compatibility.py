"""Compatibility of targets and losses: divergences, temperatures, and what each method serves."""

from __future__ import annotations

from megadistill.errors import ConfigError
from megadistill.targets.divergence_registry import DIVERGENCES
from megadistill.targets.method import find_method


def check_divergence(
    method: str,
    divergence: str,
    *,
    kd_temperature: float,
    made_at: float,
    ground_truth_residual: bool = False,
) -> None:
    """Refuse a divergence that targets of `method` cannot serve (ConfigError).

    Sampled targets are estimates of single probabilities: only what is linear in the teacher's
    distribution, forward KL, stays unbiased, and only at the temperature they were drawn at. They
    leave out no mass that could be put on the true token.
    """
    if divergence not in DIVERGENCES:
        raise ConfigError(
            f"loss.divergence: {divergence!r} is not known, expected one of "
            f"{', '.join(DIVERGENCES.names())}"
        )
    served = find_method(method)
    if served.divergences is not None and divergence not in served.divergences:
        raise ConfigError(
            f"loss.divergence: {divergence} cannot be computed from {method} targets, which are "
            f"unbiased for {', '.join(served.divergences)} only: set "
            f"loss.divergence={served.divergences[0]}, or generate with targets.method=topk"
        )
    if ground_truth_residual and divergence != "forward_kl":
        raise ConfigError(
            f"loss.ground_truth_residual: true with loss.divergence={divergence}, expected "
            "forward_kl, which alone weighs the true token by the mass it is given: set "
            "loss.divergence=forward_kl, or loss.ground_truth_residual=false"
        )
    if ground_truth_residual and not served.serves_residual:
        raise ConfigError(
            f"loss.ground_truth_residual: true with {method} targets, which leave nothing out that "
            "could be the true token's: set loss.ground_truth_residual=false, or "
            "targets.method=topk"
        )
    if not served.serves_other_temperatures and kd_temperature != made_at:
        raise ConfigError(
            f"loss.temperature: {kd_temperature} differs from the targets' temperature "
            f"{made_at}, the only one {method} targets can serve: set loss.temperature={made_at}, "
            f"or generate with targets.temperature={kd_temperature}"
        )


def divergence_name(divergence: str, *, kd_temperature: str, made_at: float, coarse: bool) -> str:
    """Returns the name. coarse: at another temperature than the targets' own, at any time."""
    if not coarse:
        return divergence if made_at == 1 else f"{divergence} at temperature {made_at:g}"
    return (
        f"coarse {divergence} at temperature {kd_temperature} (over listed ids and tail, put into "
        f"buckets at {made_at:g})"
    )
