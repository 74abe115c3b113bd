"""The gated activation in Triton."""

# T tokens · F mlp width

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.rows8 import Rows8
from headrace.ops.rows8.triton import empty_rows8, scaled_to_most, warps_for
from headrace.ops.triton import Gpu


@triton.jit
def silu_mul_kernel(
    gate_up_T2F,
    act_TF,
    scale_T,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EIGHT: tl.constexpr,  # whether a program has a whole row and writes it in eight bits
    PDL: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    token = tl.program_id(0).to(tl.int64)
    at = token * (2 * WIDTH) + column
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up_T2F + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_T2F + at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    # Rounded where the reference rounds.
    dtype: tl.constexpr = gate_up_T2F.dtype.element_ty
    gated = (gate / (1 + tl.exp(-gate))).to(dtype)
    act = gated.to(tl.float32) * up
    if EIGHT:
        act, scale = scaled_to_most(act.to(dtype).to(tl.float32))
        tl.store(scale_T + token, scale)
    tl.store(act_TF + token * WIDTH + column, act.to(act_TF.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Settings:
    """How a launch is divided."""

    block: int  # columns a program, a power of two
    warps: int  # a program

    @staticmethod
    def best(tokens: int) -> Settings:
        """Few tokens: a 16-byte access a thread, on as many cores as there are; many: two."""
        return Settings(1024, 4) if tokens <= FEW_TOKENS else Settings(2048, 4)


FEW_TOKENS = 64


class TritonSiluMul:
    """What `reference.silu_mul` is, as a callable."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def __call__(self, gate_up_T2F: Tensor, settings: Settings | None = None) -> Tensor:
        gate_up_T2F = gate_up_T2F.contiguous()
        tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
        act_TF = torch.empty((tokens, width), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
        settings = settings or Settings.best(tokens)
        self._gpu.run(
            silu_mul_kernel,
            (tokens, triton.cdiv(width, settings.block)),
            gate_up_T2F,
            act_TF,
            act_TF,
            WIDTH=width,
            BLOCK=settings.block,
            EIGHT=False,
            warps=settings.warps,
        )
        return act_TF

    def rows8(self, gate_up_T2F: Tensor) -> Rows8:
        """Returns what `reference.silu_mul` does, each row rounded to eight bits."""
        gate_up_T2F = gate_up_T2F.contiguous()
        tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
        rows = empty_rows8(tokens, width, gate_up_T2F.device)
        self._gpu.run(
            silu_mul_kernel,
            (tokens, 1),
            *(gate_up_T2F, rows.codes_TX, rows.scale_T),
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            EIGHT=True,
            warps=warps_for(width),
        )
        return rows
