"""Chunks of positions through the head's weight: losses, and gradients by all that went in.

A chunk's logits [C, V] live in one buffer, are turned in place into their gradient, and from there
into the gradients of the hidden states and of the weight. So [N, V] never exists.

The gradients are formed in the forward pass (mode "forward": three matrix products in all, as
ordinary training has; the backward pass only scales them), or the chunks are gone through again in
the backward pass (mode "recompute": four products). Recomputing keeps nothing between the two
passes: hidden states [N, H] and float32 [V, H] are held back until they are asked for, which pays
where something else is alive meanwhile, and where many losses come before one backward pass.

The weight's gradient is summed over chunks in float32 (float64 for float64 weights), also where the
weight is bfloat16: [V, H] in float32, the price of not rounding once a chunk.

Measured and left out: a gradient filter (Cut Cross-Entropy, arXiv 2411.09009) that skips blocks of
128 rows x 256 ids, ids sorted by mean probability, where the softmax stays below 2^-12. It would
leave 4 % of the blocks of synthetic distributions over 131,072 ids, 58 % of the demo's teacher's at
1.9 nats and 89 % at 4.4, so two of the three products could nearly go. But it drops 0.1 to 1 % of
the mass in every row, always of the same ids: a bias, where the targets have none.

Shapes: N positions, H hidden size, V the weight's rows, C positions of a chunk.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megadistill.student.calibration import BINS, calibration_bins
from megadistill.student.loss.dense_divergence import distill_dense, union_entries
from megadistill.student.loss.row_kernel import Entries, RowLosses, Terms, distill_rows
from megadistill.targets.kinds import Member

MODES = ("forward", "recompute")
# 256 MiB of float32 logits. At H = 1024, V = 32,768 on one core, N = 2048 positions took in their
# three products 4.90 s in chunks of 256 rows, 4.70 s of 512, 4.67 s of 1024, and 5.00 s at once.
BUFFER_ELEMENTS = 2**26
# Of whole distributions of a teacher there are three such buffers, so each is smaller.
DENSE_ELEMENTS = BUFFER_ELEMENTS // 2

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # hidden_NH, weight_VH, bias_V
Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class TeacherTerm:
    """Targets of one teacher, and their share of the distillation term."""

    targets: Member
    share: float
    made_at: float  # the targets' temperature

    @property
    def is_whole(self) -> bool:
        """Whether whole distributions are compared."""
        dense = self.targets.dense
        return dense is not None and dense.k is None

    def terms(self, terms: Terms, *, first: bool) -> Terms:
        """Returns the terms of the teacher's pass over the logits; hard ones only for the first."""
        hard = (terms.ce, terms.z) if first else (0.0, 0.0)
        return dataclasses.replace(
            terms, kd=terms.kd * self.share, ce=hard[0], z=hard[1], made_at=self.made_at
        )


@dataclass(frozen=True)
class Chunks:
    """Holds the settings and inputs of all chunks. All positions have a label."""

    teachers: tuple[TeacherTerm, ...]
    labels_N: torch.Tensor
    terms: Terms
    vocab_size: int  # rows of the weight that take part; the others are padding
    chunk: int
    logit_scale: float = 1.0
    softcap: float | None = None
    agreement: bool = False
    calibration: bool = False


class Sums(NamedTuple):
    """Sums over all positions, float64; neither weighted nor multiplied by T squared."""

    kd: torch.Tensor
    ce: torch.Tensor
    z: torch.Tensor
    agreed: torch.Tensor  # int64
    calibration_M3: torch.Tensor  # of calibration.py; zeros unless asked for


def default_chunk(positions: int, vocab: int, buffer_elements: int = BUFFER_ELEMENTS) -> int:
    """Positions of a chunk: what the buffer holds, and a quarter of the batch at most.

    Plain cross-entropy holds 3.5 times the logits of the batch at its peak.
    """
    return max(1, min(buffer_elements // vocab, max(64, -(-positions // 4))))


def choose_mode(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, budget: float | None) -> str:
    """The mode in which what is kept from the forward to the backward pass fits a budget in GiB.

    None: gradients in the forward.
    """
    kept = hidden_NH.nbytes + 4 * weight_VH.numel()
    return "forward" if budget is None or kept <= budget * 2**30 else "recompute"


class FusedDistillation(torch.autograd.Function):
    """(loss, *`Sums`), given hidden_NH, weight_VH, bias_V, chunks, mode."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        chunks: Chunks,
        mode: str,
    ) -> tuple[torch.Tensor, ...]:
        terms, tensors = chunks.terms, (hidden_NH, weight_VH, bias_V)
        ctx.mode = mode
        if mode == "recompute":
            sums, _ = run_chunks(tensors, chunks)
            ctx.save_for_backward(*tensors)
            ctx.chunks = chunks
        else:
            # float16 ends at 6e-8, where a gradient divided by the batch lies: divide on the way
            # back, where the loss scaler has its say.
            half = hidden_NH.dtype == torch.float16
            ctx.later = (max(terms.kd, terms.ce, terms.z) or 1.0) if half else 1.0
            sums, grads = run_chunks(
                tensors, chunks, wanted=ctx.needs_input_grad[:3], factor=1 / ctx.later
            )
            ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*sums)
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        loss = terms.kd * sums.kd + terms.ce * sums.ce + terms.z * sums.z
        return loss.to(wide), *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.mode == "recompute":
            wanted = ctx.needs_input_grad[:3]
            # float() waits for the device, once a backward pass.
            _, grads = run_chunks(
                ctx.saved_tensors, ctx.chunks, wanted=wanted, factor=float(grad_loss)
            )
            return *grads, None, None
        grads = ctx.saved_tensors
        grad_loss = grad_loss * ctx.later
        if grad_loss != 1:  # the host waits here for the forward pass on the device
            for grad in grads:
                if grad is not None:
                    # In place: at V = 128k a second [V, H] costs 2 GB.
                    grad.mul_(grad_loss)
        return *grads, None, None


def run_chunks(
    tensors: Tensors,
    chunks: Chunks,
    *,
    wanted: tuple[bool, ...] = (False, False, False),
    factor: float = 1.0,
) -> tuple[Sums, Grads]:
    """The sums, and `factor` times the wanted gradients of the loss."""
    hidden_NH, weight_VH, bias_V = tensors
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    count, vocab = len(hidden_NH), chunks.vocab_size
    grad_hidden_NH = torch.empty_like(hidden_NH) if wanted[0] else None
    # The first chunk writes it. Without positions there is none.
    make = torch.empty_like if count else torch.zeros_like
    grad_weight_VH = make(weight_VH, dtype=wide) if wanted[1] else None
    grad_bias_V = None
    if bias_V is not None and wanted[2]:
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide)

    # All [C, V] memory of the pass, made here once: allocating it in each chunk would let the
    # allocator keep several.
    buffers = _Buffers.of(hidden_NH, weight_VH, chunks)
    terms, softcap = chunks.terms, chunks.softcap
    # d loss / d (hidden @ weight.T + bias) carries the logit scale once.
    factor *= chunks.logit_scale
    scaled = dataclasses.replace(
        terms, kd=terms.kd * factor, ce=terms.ce * factor, z=terms.z * factor
    )
    # Sums stay on the device, in float64, so that no chunk makes the host wait; the loop over
    # micro-batches reads them once. A few float64 additions a chunk cost nothing on a GPU either.
    kd, ce, z = hidden_NH.new_zeros(3, dtype=torch.float64)
    agreed = torch.zeros_like(kd, dtype=torch.int64)
    calibration_M3 = kd.new_zeros(BINS, 3)
    for start in range(0, count, chunks.chunk):
        rows = slice(start, min(start + chunks.chunk, count))
        hidden_CH = hidden_NH[rows]
        part = buffers.rows(rows.stop - start)
        all_CV, mine = part.logits, part.ids(vocab)
        _logits(hidden_CH, weight_VH, bias_V, chunks.logit_scale, all_CV)
        z_CV, slope_CV = mine.logits, mine.slopes
        if softcap is not None and slope_CV is not None:
            # The cap's derivative, 1 - tanh^2, is kept: after the row kernel z holds a gradient and
            # no logits to compute it from.
            z_CV.div_(softcap).tanh_()
            torch.square(z_CV, out=slope_CV).neg_().add_(1)
            z_CV.mul_(softcap)
        labels_C = chunks.labels_N[rows]
        best_C = z_CV.argmax(1) if chunks.agreement or chunks.calibration else labels_C
        # From here on z is the gradient by the logits, its weights and normalizers included.
        losses, top_C = _losses(mine, rows, scaled, chunks)
        if top_C is not None:
            agreed += top_C.eq(best_C).sum()
        kd += losses.kd.double().sum()
        ce += losses.ce.double().sum()
        z += losses.z.double().sum()
        if chunks.calibration:
            calibration_M3 += calibration_bins(losses.top_prob, best_C == labels_C)
        if slope_CV is not None:
            z_CV.mul_(slope_CV)
        # Columns of padding hold logits still; the products below take in whole rows.
        all_CV[:, vocab:].zero_()
        if grad_hidden_NH is not None:
            torch.mm(all_CV.to(weight_VH.dtype), weight_VH, out=grad_hidden_NH[rows])
        if grad_weight_VH is not None:
            _accumulate(grad_weight_VH, all_CV, hidden_CH, first=start == 0)
        if grad_bias_V is not None:
            grad_bias_V += all_CV.sum(0)
    sums = Sums(kd, ce, z, agreed, calibration_M3)
    return sums, (grad_hidden_NH, grad_weight_VH, grad_bias_V)


@dataclass(frozen=True)
class _Buffers:
    """[C, V] each, made once; None where nobody needs it."""

    logits: torch.Tensor
    slopes: torch.Tensor | None  # of a soft cap
    dense: torch.Tensor | None  # a teacher's whole distributions
    scratch: torch.Tensor | None
    again: torch.Tensor | None  # the logits once more, for all teachers but the first
    work: torch.Tensor | None  # what those between the first and the last write over

    @classmethod
    def of(cls, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, chunks: Chunks) -> _Buffers:
        shape = (min(chunks.chunk, len(hidden_NH)), len(weight_VH))
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)

        def buffer(needed: bool) -> torch.Tensor | None:
            return hidden_NH.new_empty(shape, dtype=wide) if needed else None

        teachers = chunks.teachers
        logits = buffer(True)
        assert logits is not None
        return cls(
            logits,
            slopes=buffer(chunks.softcap is not None),
            dense=buffer(any(t.targets.dense is not None for t in teachers)),
            scratch=buffer(any(t.is_whole or t.made_at != 1 for t in teachers)),
            again=buffer(len(teachers) > 1),
            work=buffer(len(teachers) > 2),
        )

    def rows(self, count: int) -> _Buffers:
        """The first so many rows."""
        return self._cut((slice(count),))

    def ids(self, count: int) -> _Buffers:
        """The first so many columns."""
        return self._cut((slice(None), slice(count)))

    def for_one_more(self, *, last: bool) -> torch.Tensor:
        """The logits for another teacher, to be written over. The last one needs no copy."""
        assert self.again is not None
        if last:
            return self.again
        assert self.work is not None
        return self.work.copy_(self.again)

    def _cut(self, part: tuple[slice, ...]) -> _Buffers:
        def cut(buffer: torch.Tensor | None) -> Any:
            return None if buffer is None else buffer[part]

        return _Buffers(
            cut(self.logits),
            cut(self.slopes),
            cut(self.dense),
            cut(self.scratch),
            cut(self.again),
            cut(self.work),
        )


def _losses(
    buffers: _Buffers, rows: slice, terms: Terms, chunks: Chunks
) -> tuple[RowLosses, torch.Tensor | None]:
    """The losses of a chunk by all teachers, and the first one's most probable ids where wanted.

    buffers.logits becomes the sum of their gradients.
    """
    z_CV, labels_C = buffers.logits, chunks.labels_N[rows]
    if not chunks.teachers:
        return distill_rows(z_CV, None, labels_C, terms), None
    first, *others = chunks.teachers
    if buffers.again is not None:
        buffers.again.copy_(z_CV)
    losses, top_C = _pass(
        z_CV,
        first.targets.rows(rows.start, rows.stop),
        labels_C,
        first.terms(terms, first=True),
        buffers,
        agreement=chunks.agreement,
    )
    for teacher in others:
        again_CV = buffers.for_one_more(last=teacher is others[-1])
        more, _ = _pass(
            again_CV,
            teacher.targets.rows(rows.start, rows.stop),
            labels_C,
            teacher.terms(terms, first=False),
            buffers,
            agreement=False,
        )
        z_CV.add_(again_CV)
        kd_C = first.share * losses.kd if teacher is others[0] else losses.kd
        losses = dataclasses.replace(losses, kd=kd_C + teacher.share * more.kd)
    return losses, top_C


def _pass(
    z_CV: torch.Tensor,
    targets: Member,
    labels_C: torch.Tensor,
    terms: Terms,
    buffers: _Buffers,
    *,
    agreement: bool,
) -> tuple[RowLosses, torch.Tensor | None]:
    """Returns a teacher's losses of a chunk and its most probable ids; z becomes the gradient."""
    scratch_CV = buffers.scratch
    if targets.listed is not None:
        entries = Entries.of(targets.listed, z_CV.dtype)
        top_C = entries.top_id() if agreement else None
        return distill_rows(z_CV, entries, labels_C, terms, scratch_CV=scratch_CV), top_C
    dense = targets.dense
    assert dense is not None
    assert buffers.dense is not None
    log_p_CV = dense.log_probs(temperature=terms.temperature, out_CV=buffers.dense)
    top_C = log_p_CV.argmax(1) if agreement else None
    if dense.k is None:
        assert scratch_CV is not None
        losses = distill_dense(
            z_CV, log_p_CV, labels_C, terms, scratch_CV=scratch_CV, has_C=dense.has_N
        )
        return losses, top_C
    entries = union_entries(z_CV, log_p_CV, dense.k)
    return distill_rows(z_CV, entries, labels_C, terms, scratch_CV=scratch_CV), top_C


def _logits(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    scale: float,
    out_CV: torch.Tensor,
) -> None:
    if out_CV.dtype == hidden_CH.dtype:
        torch.mm(hidden_CH, weight_VH.T, out=out_CV)
    else:
        out_CV.copy_(hidden_CH @ weight_VH.T)
    if bias_V is not None:
        out_CV.add_(bias_V)
    if scale != 1:
        out_CV.mul_(scale)


def _accumulate(
    sum_VH: torch.Tensor, z_CV: torch.Tensor, hidden_CH: torch.Tensor, *, first: bool
) -> None:
    """sum += z.T @ hidden, or = the first time; in float32 whatever the factors are."""
    if hidden_CH.dtype != sum_VH.dtype and hidden_CH.is_cuda:
        # Tensor cores multiply in the factors' dtype and add up in float32.
        factor_VC = z_CV.to(hidden_CH.dtype).T
        if first:
            torch.mm(factor_VC, hidden_CH, out_dtype=sum_VH.dtype, out=sum_VH)
        else:
            sum_VH.add_(torch.mm(factor_VC, hidden_CH, out_dtype=sum_VH.dtype))
    else:
        # beta = 0 does not read what is there.
        sum_VH.addmm_(z_CV.T, hidden_CH.to(sum_VH.dtype), beta=0 if first else 1)
