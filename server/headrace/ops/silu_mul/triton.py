"""The gated activation in Triton."""

# T tokens · F mlp width

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.triton import Gpu


@triton.jit
def silu_mul_kernel(
    gate_up_T2F, act_TF, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
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
    gated = (gate / (1 + tl.exp(-gate))).to(act_TF.dtype.element_ty)
    act = gated.to(tl.float32) * up
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
            WIDTH=width,
            BLOCK=settings.block,
            warps=settings.warps,
        )
        return act_TF
