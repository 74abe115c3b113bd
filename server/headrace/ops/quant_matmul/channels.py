"""Products of eight-bit floats with rows of eight bits, where each output has one scale.

The tensor cores multiply both as they are, at twice the speed of 16 bits; scales of rows and of
outputs are multiplied in at the end. Few rows are bound by the weight, and go through our kernels
of few rows; more go through PyTorch's scaled product.
"""

# T tokens · Y outputs · I inputs

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.matmul.settings import Setting
from headrace.ops.matmul.skinny import Scratch, product
from headrace.ops.quant_matmul.base import CodedWeight, Kind
from headrace.ops.quant_matmul.settings import (
    ROWS_MAX,
    SCALED_AFTER,
    best_channels,
    bucket_of,
)
from headrace.ops.rows8.base import Rows8
from headrace.ops.triton import Gpu

# What the tensor cores' loads and PyTorch's scaled product need a dimension to be a multiple of.
MULTIPLE = 16
_scaled_mm: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
DTYPES = (torch.bfloat16, torch.float16)
# Numbers of a program that scales.
_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Channels:
    """A weight as it is multiplied.

    Attributes:
        codes_YI: float8_e4m3fn, contiguous.
        scales_Y: float32.
        dtype: of results.
        settings: by number of rows, up to `ROWS_MAX`; None for PyTorch's product.
        scaled_after: numbers of rows for which that is faster with the scales apart.
        one: float32 [], 1.
    """

    codes_YI: Tensor
    scales_Y: Tensor
    dtype: torch.dtype
    settings: tuple[Setting | None, ...]
    scaled_after: range
    one: Tensor


def refusal(weight: CodedWeight, dtype: torch.dtype) -> str | None:
    """Why a weight is not multiplied so, or None."""
    if dtype not in DTYPES:
        return f"activations are {dtype}"
    if weight.kind != Kind.FP8 or weight.codes.dtype != torch.float8_e4m3fn:
        return "codes are no numbers of the kind e4m3"
    if weight.scales_YG.shape[1] != 1:
        return "outputs have more scales than one"
    if weight.outputs % MULTIPLE or weight.columns % MULTIPLE:
        return f"{weight.outputs} x {weight.columns} are no multiples of {MULTIPLE}"
    return None


def pack(weight: CodedWeight, dtype: torch.dtype, scratch: Scratch) -> Channels:
    """Stores a weight for `multiply`; `refusal` has no reason."""
    settings = best_channels(weight.outputs, weight.columns)
    for setting in settings:
        if setting is not None:
            scratch.reserve(setting, weight.outputs)
    return Channels(
        codes_YI=weight.codes.contiguous(),
        scales_Y=weight.scales_YG[:, 0].float().contiguous(),
        dtype=dtype,
        scaled_after=SCALED_AFTER.get((weight.outputs, weight.columns), range(0)),
        one=torch.ones((), device=weight.codes.device),
        settings=(None, *(settings[bucket_of(rows)] for rows in range(1, ROWS_MAX + 1))),
    )


def multiply(
    x_TI: Rows8, weight: Channels, bias_Y: Tensor | None, scratch: Scratch, gpu: Gpu
) -> Tensor:
    """Returns x_TI @ weight_YI.T + bias_Y, new."""
    codes_TI, scale_T = x_TI
    rows = codes_TI.shape[0]
    setting = weight.settings[rows] if rows <= ROWS_MAX else None
    if setting is not None:
        return product(
            *(codes_TI, weight.codes_YI, bias_Y, setting, scratch, gpu),
            scales_N=weight.scales_Y,
            x_scales_M=scale_T,
            dtype=weight.dtype,
        )
    if rows in weight.scaled_after and bias_Y is None:
        return _scaled_after(x_TI, weight, gpu)
    return _scaled_mm(
        *(codes_TI, weight.codes_YI.T, scale_T[:, None], weight.scales_Y[None, :], bias_Y),
        out_dtype=weight.dtype,
        use_fast_accum=True,
    )


def _scaled_after(x_TI: Rows8, weight: Channels, gpu: Gpu) -> Tensor:
    """The product of the codes, scaled in place: for some shapes the library's product without
    scales is so much faster that a further kernel pays."""
    y_TY = _scaled_mm(
        *(x_TI.codes_TX, weight.codes_YI.T, weight.one, weight.one),
        out_dtype=weight.dtype,
        use_fast_accum=True,
    )
    rows, outputs = y_TY.shape
    gpu.run(
        scale_kernel,
        (rows, triton.cdiv(outputs, _BLOCK)),
        *(y_TY, x_TI.scale_T, weight.scales_Y, outputs),
        BLOCK=_BLOCK,
        warps=4,
    )
    return y_TY


@triton.jit
def scale_kernel(y, row_scales, scales, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y[M, N] *= row_scales[M] * scales[N]."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
    scale = tl.load(scales + n, n < N, 0.0)
    if PDL:
        gdc_wait()
    y += row * N + n
    scaled = tl.load(y, n < N, 0.0).to(tl.float32) * (scale * tl.load(row_scales + row))
    tl.store(y, scaled.to(y.dtype.element_ty), n < N)
