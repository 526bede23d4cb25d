"""Compares the engine and our head with the model itself, before the teacher answers anything.

An engine can change a model without failing: rotary frequencies rounded to bfloat16, a layer
sharded by the wrong dimension, a window or a soft-cap left out, documents that see each other. So
the teacher is compared with transformers alone (`teacher/reference.py`) at every start, on random
tokens, in the run's dtype, over all positions up to `data.seq_len`.

Two sequences go through the engine (`models/probe_tokens.py`): one document of seq_len tokens, and
several documents packed. The documents are prefixes of the first sequence. In a causal model they
have the log-probabilities that the reference gave for the same positions, so the reference runs
once.

Distance is the mean KL from the reference in float32, for each quarter of the positions. What the
plain model's own rounding moves (float32 against the run's dtype) is measured beside it, and the
engine may move 1.5 times as much, and four standard errors. So a change of three times the rounding
is found. Arithmetic: four forwards of seq_len tokens, two of them the engine's. The log tells how
small a change would have been found.

Rounding has a heavy tail where a model chooses: a router near a tie sends a token to another
expert. One sequence may hold such a token for the engine, and none for the plain model. So an
engine that seems to move more is compared on three more sequences, and judged on all four.

For a Llama of 1.6 billion parameters at 2,048 tokens, in bfloat16 on two CPU cores, the reference
takes 66 s and the engine's passes with the comparison 68 s (tensor_parallel, tp = 2) or 143 s
(zero3, where two ranks run the same), beside 5 s and 11 s for loading.

Under tensor_parallel the tensor-parallel group of each host's first rank is compared; under zero3
rank 0 of each host compares. The reference runs on that rank while the others wait.

Shape letters: R sequences compared, T positions, C positions of a chunk, H hidden size, V
vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megadistill.config import TeacherConfig
from megadistill.errors import TeacherError, first_line
from megadistill.models.probe_tokens import Probe
from megadistill.parallel import Mesh
from megadistill.teacher.chunked_head import TeacherHead
from megadistill.teacher.reference import Reference, all_threads

log = logging.getLogger(__name__)

ADVICE = "use teacher.engine=zero3 with teacher.tp=1, which runs the model's own modules"
FLOOR = 1e-6  # nats; float32 sums in another order stay far below
QUARTERS = 4
SEQUENCES = 4  # at most


class Verification:
    """The reference's answers to the probe, held until the engine has given its own."""

    def __init__(
        self, config: TeacherConfig, mesh: Mesh, *, seq_len: int, vocab_size: int, key: str
    ) -> None:
        """Runs the reference. Collective over all ranks; most of them only wait.

        Raises ConfigError where the model cannot be loaded, TeacherError where transformers cannot
        run it.
        """
        self.config, self.mesh, self.key = config, mesh, key
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.leaders = mesh.first_of_hosts(among=range(0, mesh.world, mesh.tp))
        self.seconds = time.monotonic()
        self.distances: list[_Distances] = []
        self.reference: Reference | None = None
        self._run_reference(seed=0)

    def _run_reference(self, seed: int) -> None:
        self.probe = Probe.of(seq_len=self.seq_len, vocab_size=self.vocab_size, seed=seed)
        self.seed = seed
        tokens_T = torch.from_numpy(self.probe.tokens_T)

        def run() -> Reference:
            with all_threads():
                if self.reference is None:
                    device = self.mesh.device
                    return Reference(self.config, tokens_T, key=self.key, device=device)
                self.reference.run(tokens_T)
                return self.reference

        self.reference = self.mesh.on(self.leaders, run)

    @property
    def compares(self) -> bool:
        """Whether this rank's tensor-parallel group takes part in the comparison."""
        return self.mesh.rank - self.mesh.tp_rank in self.leaders

    @property
    def plain(self) -> Any:
        """The model of `load_deferred`; None on ranks that do not run the reference.

        Buffers, and parameters in float32 beside another dtype, have their values.
        """
        return None if self.reference is None else self.reference.model

    @torch.no_grad()
    def compare(
        self, head: TeacherHead, alone_TH: torch.Tensor | None, packed_TH: torch.Tensor | None
    ) -> bool:
        """Returns whether the comparison is over. If not, `probe` has other tokens to be asked for.

        alone_TH: the engine's hidden states for the first sequence, None where this rank does not
        compare. packed_TH: for the second, or None where documents need not be kept apart.
        Raises TeacherError on every rank where one group's engine is not the model. Collective
        over all ranks.
        """
        problem, line = None, ""
        if self.compares:
            assert alone_TH is not None
            self.distances.append(_Distances.of(self, head, alone_TH, packed_TH))
            distances = _Distances.joined(self.distances)
            problem, line = distances.problem(self), distances.line()
        problems = [found for found in self.mesh.gather(problem) if found]
        if problems and self.seed + 1 < SEQUENCES and self.config.dtype != "float32":
            self._run_reference(seed=self.seed + 1)
            return False
        self.reference = None
        if problems:
            error = TeacherError(problems[0])
            error.common = True
            raise error
        seconds = time.monotonic() - self.seconds
        if self.mesh.rank == 0:
            log.info("%s: %s (%.1f s)", self.key, line, seconds)
        return True

    def name(self) -> str:
        assert self.reference is not None
        model: Any = self.reference.model
        return f"{type(model).__name__} ({model.config.model_type})"


@dataclass
class _Distances:
    """KL in nats, float64 [R, T] each, from the reference in float32.

    rounding_RT  of the reference in the run's dtype; zeros in float32
    alone_RT     of the engine, one document
    packed_RT    of the engine, several documents in the sequence; None where not kept apart
    positions_T  of the tokens of those documents
    """

    rounding_RT: torch.Tensor
    alone_RT: torch.Tensor
    packed_RT: torch.Tensor | None
    positions_T: torch.Tensor

    @classmethod
    def joined(cls, each: list[_Distances]) -> _Distances:
        packed = [d.packed_RT for d in each if d.packed_RT is not None]
        return cls(
            torch.cat([d.rounding_RT for d in each]),
            torch.cat([d.alone_RT for d in each]),
            torch.cat(packed) if packed else None,
            each[0].positions_T,
        )

    @classmethod
    def of(
        cls,
        of: Verification,
        head: TeacherHead,
        alone_TH: torch.Tensor,
        packed_TH: torch.Tensor | None,
    ) -> _Distances:
        positions_T = torch.from_numpy(of.probe.positions_T)
        T, reference = len(positions_T), of.reference
        found = torch.zeros(3, T, dtype=torch.float64)
        V = of.vocab_size
        for first in range(0, T, head.chunk):
            rows = slice(first, min(first + head.chunk, T))
            exact_CV = torch.empty(rows.stop - first, V, device=of.mesh.device)
            if reference is not None:
                exact_CV = reference.log_probs(reference.exact_TH[rows], vocab_size=V)
                if reference.dtype != torch.float32:
                    own_CV = reference.log_probs(reference.hidden_TH[rows], vocab_size=V)
                    found[0, rows] = _kl(exact_CV, own_CV).cpu()
            if of.mesh.tp > 1:
                dist.broadcast(exact_CV, of.mesh.rank - of.mesh.tp_rank, group=of.mesh.tp_group)
            found[1, rows] = head_kl(head, exact_CV, alone_TH[rows])
            if packed_TH is None:
                continue
            inside = ((positions_T >= first) & (positions_T < rows.stop)).nonzero()[:, 0]
            for part in inside.split(head.chunk):
                exact_PV = exact_CV[positions_T[part] - first]
                found[2, part] = head_kl(head, exact_PV, packed_TH[part])
        # Each rank has summed over its slice of the vocabulary; where it has all of it, one counts.
        if of.mesh.tp > 1:
            if head.vocabulary.size == V and of.mesh.tp_rank > 0:
                found.zero_()
            found = of.mesh.sum(found, group=of.mesh.tp_group)
        packed_RT = None if packed_TH is None else found[2:]
        return cls(found[:1], found[1:2], packed_RT, positions_T)

    def bounds(self, positions_T: torch.Tensor) -> list[float]:
        """The largest mean that counts as rounding, for each quarter of a sequence.

        positions_T: the reference's position of each token. Documents repeat positions, and what
        is repeated is one observation. The spread is that of all positions: in mixtures of experts
        rounding moves few of them, by much, and one quarter may have had none.
        """
        spread = 4 * math.sqrt(2) * float(self.rounding_RT.std(correction=0))
        return [
            FLOOR
            + 1.5 * float(self.rounding_RT[:, q].mean())
            + spread / math.sqrt(len(self.rounding_RT) * len(torch.unique(q)))
            for q in _quarters(positions_T)
        ]

    def problem(self, of: Verification) -> str | None:
        checks = [("one document", self.alone_RT, torch.arange(len(self.positions_T)))]
        if self.packed_RT is not None:
            checks.append(("several documents in a sequence", self.packed_RT, self.positions_T))
        for what, kl_RT, positions_T in checks:
            means, bounds = _quarter_means(kl_RT), self.bounds(positions_T)
            for number, (mean, bound) in enumerate(zip(means, bounds, strict=True), 1):
                if not mean <= bound:  # also where it is not a number
                    leaks = self.packed_RT is kl_RT
                    what = f"{kl_RT.numel()} random tokens ({what})"
                    return _message(of, what, number, means, mean, bound, leaks)
        return None

    def line(self) -> str:
        parts = [_means(self.alone_RT)]
        if self.packed_RT is not None:
            parts.append(f"{_means(self.packed_RT)} with several documents in the sequence")
        visible = max(self.bounds(torch.arange(len(self.positions_T))))
        return (
            f"compared with transformers on {self.alone_RT.numel()} random tokens: KL by quarter "
            f"of the positions {', '.join(parts)}; a change of {visible:.1g} nats would have been "
            "found"
        )


def head_kl(head: TeacherHead, exact_CV: torch.Tensor, hidden_CH: torch.Tensor) -> torch.Tensor:
    """float64 [C] on the CPU: KL from `exact_CV` over this rank's slice of the vocabulary."""
    ours_CV = head.log_probs(hidden_CH)
    first = head.vocabulary.first
    exact_CV = exact_CV[:, first : first + ours_CV.shape[1]]
    return _kl(exact_CV, ours_CV).cpu()


def _kl(own_CV: torch.Tensor, other_CV: torch.Tensor) -> torch.Tensor:
    """float64 [C]. p * (expm1(d) - d) is positive term by term: sums over slices add up."""
    difference_CV = other_CV.double() - own_CV.double()
    return (own_CV.double().exp() * (difference_CV.expm1() - difference_CV)).sum(1)


def _quarters(values: torch.Tensor) -> list[torch.Tensor]:
    """Parts of the last dimension; fewer than four where it is shorter."""
    return [q for q in values.tensor_split(QUARTERS, dim=-1) if q.numel()]


def _quarter_means(kl_RT: torch.Tensor) -> list[float]:
    return [float(q.mean()) for q in _quarters(kl_RT)]


def _means(kl_RT: torch.Tensor) -> str:
    return " ".join(f"{mean:.1g}" for mean in _quarter_means(kl_RT))


def _message(
    of: Verification,
    what: str,
    number: int,
    means: list[float],
    mean: float,
    bound: float,
    leaks: bool,
) -> str:
    sharded = of.mesh.tp > 1
    where = f"teacher.tp: {of.mesh.tp}" if sharded else of.key
    if leaks:
        way_out = (
            "documents of a sequence are not kept apart: set data.pack=concat, or use another "
        )
        way_out += "model or teacher.attention"
    elif sharded:
        way_out = ADVICE
    else:
        way_out = (
            "heads that are known are linear, with logit_scale, logits_scaling or "
            "final_logit_softcapping in config.json"
        )
    name = of.name() if of.reference is not None else "the model"
    return (
        f"{where}: {name} under DeepSpeed says something else than in transformers: on {what}, "
        f"quarter {number} of the positions, KL {mean:.2g} nats, expected at most {bound:.1g} "
        f"(by quarter: {' '.join(f'{m:.1g}' for m in means)}): {way_out}"
    )


@contextlib.contextmanager
def sharding_errors(model: Any, mesh: Mesh) -> Iterator[None]:
    """Raises what sharding `model` dies of as a TeacherError that names the architecture.

    Only where it is sharded: at tp = 1 there is no AutoTP to blame, and an error goes its way.
    """
    if mesh.tp == 1:
        yield
        return
    try:
        yield
    except (torch.OutOfMemoryError, dist.DistError):
        raise
    except (
        AssertionError,
        AttributeError,
        IndexError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise TeacherError(
            f"teacher.tp: {mesh.tp}: DeepSpeed's AutoTP cannot shard {type(model).__name__} "
            f"({model.config.model_type}) ({first_line(error)}): {ADVICE}"
        ) from error
