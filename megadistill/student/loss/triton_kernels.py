"""Triton kernels for rows of logits: norms in one read, exponentials in one read and one write.

A program goes through one row in blocks of at most 16k ids. Needs triton, which comes with CUDA
builds of torch; softmax.py says when it is used.

Shapes: C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST_BLOCK = 16_384


def norms(z_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [C] each: the maximum of a row, and its sum of exponentials relative to that.

    z_CV: float32, its columns adjacent; left as it is. A row of nothing but -inf gives -inf and 0;
    a nan or +inf in a row makes its sum nan.
    """
    top_C, total_C = (z_CV.new_empty(len(z_CV)) for _ in range(2))
    if len(z_CV):
        _norms[(len(z_CV),)](
            z_CV, top_C, total_C, z_CV.stride(0), z_CV.shape[1], BLOCK=_block(z_CV), num_warps=16
        )
    return top_C, total_C


def exponentials(
    z_CV: torch.Tensor, top_C: torch.Tensor, total_C: torch.Tensor, multiplier_C: torch.Tensor
) -> None:
    """Make z multiplier * exp(z - top) / total, in place; 0 where total is 0."""
    if len(z_CV):
        factor_C = torch.where(total_C == 0, 0.0, multiplier_C / total_C)
        _exponentials[(len(z_CV),)](
            z_CV, top_C, factor_C, z_CV.stride(0), z_CV.shape[1], BLOCK=_block(z_CV), num_warps=16
        )


def _block(z_CV: torch.Tensor) -> int:
    return min(LARGEST_BLOCK, triton.next_power_of_2(z_CV.shape[1]))


@triton.jit
def _norms(z_ptr, top_ptr, total_ptr, stride, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    top = -float("inf")
    total = 0.0
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + ids, mask=ids < vocab, other=-float("inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        # -inf minus -inf would be nan.
        origin = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - origin) + tl.sum(tl.exp(z - origin), 0)
        top = higher
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, total)


@triton.jit
def _exponentials(z_ptr, top_ptr, factor_ptr, stride, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    top = tl.load(top_ptr + row)
    origin = tl.where(top == -float("inf"), 0.0, top)
    factor = tl.load(factor_ptr + row)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + ids, mask=ids < vocab, other=-float("inf"))
        tl.store(z_ptr + ids, factor * tl.exp(z - origin), mask=ids < vocab)
