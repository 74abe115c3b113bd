"""RMS normalisation in Triton: one program a row, rounded where the reference rounds."""

# T tokens · D width

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.rows8 import Rows8
from headrace.ops.rows8.triton import empty_rows8, scaled_to_most
from headrace.ops.triton import Gpu


@triton.jit
def rms_norm_kernel(
    x_TD,
    residual_TD,  # read and overwritten with the sum; unused unless ADD
    weight_D,
    y_TD,
    scale_T,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two at or above WIDTH
    ADD: tl.constexpr,
    EIGHT: tl.constexpr,  # whether y are rows of eight bits and `scale_T` is written
    PDL: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    if PDL:
        gdc_launch_dependents()
    # Nothing in a step writes weights: they are fetched while the kernel before still runs.
    weight = tl.load(weight_D + column, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    x = tl.load(x_TD + at, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_TD + at, mask=inside, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(residual_TD.dtype.element_ty)
        tl.store(residual_TD + at, x, mask=inside)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, axis=0) / WIDTH
    normed = (wide * tl.rsqrt(mean + eps)).to(x_TD.dtype.element_ty)
    y = weight.to(tl.float32) * normed.to(tl.float32)
    if EIGHT:
        y, scale = scaled_to_most(y.to(x_TD.dtype.element_ty).to(tl.float32))
        tl.store(scale_T + tl.program_id(0), scale)
    tl.store(y_TD + at, y.to(y_TD.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Settings:
    """How a launch is divided."""

    warps: int  # a row

    @staticmethod
    def best(rows: int, width: int) -> Settings:
        """Few rows: as many loads in flight as a row has; many: room for several on a core."""
        per_thread = 8 if rows <= FEW_ROWS else 32
        threads = triton.next_power_of_2(width) // per_thread
        return Settings(min(max(threads // 32, 1), 16))


# So many rows still run at once when each takes half a multiprocessor.
FEW_ROWS = 256


class TritonRmsNorm:
    """Signatures and meaning: `reference.py`. The residual is overwritten."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        return self.launch(x, None, weight, eps)

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
        return self.launch(x_TD, residual_TD, weight_D, eps), residual_TD

    def rms_norm_8(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Rows8:
        rows = empty_rows8(x_TD.shape[0], x_TD.shape[1], x_TD.device)
        self._run(x_TD.contiguous(), None, weight_D, eps, rows.codes_TX, rows.scale_T)
        return rows

    def add_rms_norm_8(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Rows8, Tensor]:
        x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
        rows = empty_rows8(x_TD.shape[0], x_TD.shape[1], x_TD.device)
        self._run(x_TD, residual_TD, weight_D, eps, rows.codes_TX, rows.scale_T)
        return rows, residual_TD

    def launch(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        settings: Settings | None = None,
    ) -> Tensor:
        """Returns the norm of `x` or of the sum, which `residual` is overwritten with."""
        y = torch.empty_like(x)
        self._run(x, residual, weight, eps, y, None, settings)
        return y

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        y: Tensor,
        scale_T: Tensor | None,
        settings: Settings | None = None,
    ) -> None:
        width = weight.shape[0]
        rows = x.numel() // width
        assert x.shape[-1] == width and x.dtype == weight.dtype
        assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
        settings = settings or Settings.best(rows, width)
        self._gpu.run(
            rms_norm_kernel,
            (rows,),
            x,
            x if residual is None else residual,
            weight,
            y,
            y if scale_T is None else scale_T,
            eps,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            ADD=residual is not None,
            EIGHT=scale_T is not None,
            warps=settings.warps,
        )
