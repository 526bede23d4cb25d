"""Base class of divergences between two distributions over a few buckets, and their arithmetic.

A position's buckets are the listed ids and the tail as one more. p is the teacher, q the student.

Every KL(a || b) is summed by bucket as a (expm1(d) - d), d = log b - log a. That adds sum(b) -
sum(a), which is 0, and makes every term non-negative, so that rounding cannot make a divergence
negative and nothing is clamped. The logarithm of a mixture is taken relative to one of its two
parts, exact where they nearly agree and where they are far apart.

A teacher's probability of 0 is one that float32 could not hold. Where q is divided by it, it counts
as the least normal float32, e^-87.3: `Buckets.floored` keeps such a divergence finite.

Shapes: C positions, B buckets. Where p and q are both 0 (what fills up short rows) value and slope
are 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from megadistill.errors import ConfigError

TINY = torch.finfo(torch.float32).tiny
LOG_TINY = math.log(TINY)

Parameters = Mapping[str, float]
Terms = tuple[torch.Tensor, torch.Tensor]  # [C, B] each: the value by bucket, its slope


class Divergence(ABC):
    """One kind of divergence. Stateless: `terms` is given all parameters.

    parameters   name -> default. A registered divergence of another distribution gets its own from
                 the mapping `loss.options`; megadistill's own read `loss.beta` and so on
    needs_floor  whether log p is taken where p may be 0: buckets then come floored
    whole_rows   whether `terms` looks at a row as a whole. Otherwise whole distributions are gone
                 through some columns at a time, which stay in the cache of a CPU
    """

    parameters: ClassVar[Parameters] = MappingProxyType({})
    needs_floor: ClassVar[bool] = True
    whole_rows: ClassVar[bool] = False

    @abstractmethod
    def terms(self, buckets: Buckets, parameters: Parameters, *, has_tail: bool) -> Terms:
        """The value of each bucket, to be summed over a row, and its slope q * d(value) / dq.

        The slope is the derivative by log q with the other buckets held, so the gradient by the
        logit behind a bucket is slope - q * sum(slope). has_tail: whether the last column is the
        tail. parameters: a value for each of `self.parameters`.
        """


@dataclass(frozen=True)
class ChosenDivergence:
    """A divergence and the values of its parameters."""

    kind: Divergence
    parameters: Parameters

    def terms(self, buckets: Buckets, *, has_tail: bool = True) -> Terms:
        """As `Divergence.terms`, with the parameters chosen."""
        if self.kind.needs_floor:
            buckets = buckets.floored()
        return self.kind.terms(buckets, self.parameters, has_tail=has_tail)


def choose(
    name: str, kind: Divergence, own: Mapping[str, float], options: Mapping[str, Any]
) -> ChosenDivergence:
    """The divergence with its parameters: from `options`, else from `own`, else their defaults.

    own: loss.beta, loss.alpha and loss.head_mass, whichever of them the divergence has. options:
    loss.options. ConfigError for an option that is no parameter, or no number.
    """
    for key, value in options.items():
        free = [each for each in kind.parameters if each not in own]
        if key not in free:
            known = f"expected one of {', '.join(free)}" if free else "which takes none"
            raise ConfigError(
                f"loss.options.{key}: no such parameter of {name}, {known}: remove it"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(
                f"loss.options.{key}: expected a number, found {value!r}: set a number"
            )
    given = {**own, **options}
    return ChosenDivergence(
        kind, {key: float(given.get(key, default)) for key, default in kind.parameters.items()}
    )


@dataclass(frozen=True)
class Buckets:
    """Two distributions [C, B] over the same buckets, the tail in the last column."""

    p: torch.Tensor
    q: torch.Tensor
    log_p: torch.Tensor
    log_q: torch.Tensor

    @classmethod
    def of(cls, p_CB: torch.Tensor, log_q_CB: torch.Tensor) -> Buckets:
        return cls(p_CB, log_q_CB.exp(), p_CB.log(), log_q_CB)

    def softened(self, power: float) -> Buckets:
        """Both raised to a power and normalised anew: 1 / T of a temperature."""
        log_p, log_q = (torch.log_softmax(power * log, 1) for log in (self.log_p, self.log_q))
        return Buckets(log_p.exp(), log_q.exp(), log_p, log_q)

    def floored(self) -> Buckets:
        """With the least normal float32 as p where p is less and q is not 0."""
        held = (self.log_p >= LOG_TINY) | (self.q == 0)
        p, log_p = torch.where(held, self.p, TINY), torch.where(held, self.log_p, LOG_TINY)
        return Buckets(p, self.q, log_p, self.log_q)

    @property
    def gap(self) -> torch.Tensor:
        """log q - log p; nan where both are 0."""
        return self.log_q - self.log_p


def log_mixture_ratio(d: torch.Tensor, share: float) -> torch.Tensor:
    """log(share + (1 - share) e^d), exact near d = 0 and at any size of d."""
    above = d + torch.log1p(share * torch.expm1(-d))
    return torch.where(d > 0, above, torch.log1p((1 - share) * torch.expm1(d)))


def kl_terms(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """a * (exp(d) - 1 - d) with d = log b - log a: never negative; b where a is 0.

    Summed over the buckets of two distributions it is KL(a || b).
    """
    series = d * d * (1 / 2 + d / 6 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7)))))
    # Far above, a may be subnormal and exp(d) infinite, while b itself is harmless.
    terms = torch.where(d.abs() < 0.25, a * series, a * (torch.expm1(d) - d))
    terms = torch.where(d > 1, b - a - a * d, terms)
    return torch.where(a > 0, terms, b)


def where_positive(q: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """q * factor; 0 where q is 0, whose logarithm is not finite."""
    return torch.where(q > 0, q * factor, 0.0)
