"""Rows of activations in eight bits, in Triton: one program a row."""

# T tokens · X columns

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.rows8.base import DTYPE, MOST, SCALE_MIN, Rows8
from headrace.ops.triton import Gpu

_MOST = tl.constexpr(MOST)
_SCALE_MIN = tl.constexpr(SCALE_MIN)


@triton.jit
def scaled_to_most(row):
    """The row, float32, scaled so that its largest number is the largest of eight bits; the scale.

    Divides, as the reference does: a product with the reciprocal rounds otherwise.
    """
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(row), 0), _MOST), _SCALE_MIN)
    return tl.minimum(tl.maximum(tl.div_rn(row, scale), -_MOST), _MOST), scale


@triton.jit
def rows8_kernel(
    x_TX,
    codes_TX,
    scale_T,
    x_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two at or above WIDTH
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(x_TX + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    row, scale = scaled_to_most(row)
    tl.store(codes_TX + token * WIDTH + column, row.to(codes_TX.dtype.element_ty), mask=inside)
    tl.store(scale_T + token, scale)


def warps_for(width: int) -> int:
    """Warps of a program that holds a row in registers."""
    return min(max(triton.next_power_of_2(width) // (32 * 16), 1), 16)


def empty_rows8(tokens: int, width: int, device: torch.device) -> Rows8:
    """Returns rows that a kernel will fill."""
    codes_TX = torch.empty((tokens, width), dtype=DTYPE, device=device)
    return Rows8(codes_TX, torch.empty(tokens, dtype=torch.float32, device=device))


class TritonQuantizeRows:
    """What `reference.quantize_rows` is, as a callable."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def __call__(self, x_TX: Tensor) -> Rows8:
        if x_TX.stride(1) != 1:
            x_TX = x_TX.contiguous()
        tokens, width = x_TX.shape
        rows = empty_rows8(tokens, width, x_TX.device)
        self._gpu.run(
            rows8_kernel,
            (tokens,),
            *(x_TX, rows.codes_TX, rows.scale_T, x_TX.stride(0)),
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            warps=warps_for(width),
        )
        return rows
