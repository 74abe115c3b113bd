"""A predecessor that lets the next kernel start, sleeps, and writes only then.

What a kernel under programmatic dependent launch reads too early, it reads as it was before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SLEEP_NS = 400_000

SLEEP: tl.constexpr = tl.constexpr("""{
    .reg .u64 begin, now;
    .reg .pred again;
    mov.u64 begin, %globaltimer;
sleep:
    nanosleep.u32 10000;
    mov.u64 now, %globaltimer;
    sub.u64 now, now, begin;
    setp.lt.u64 again, now, $2;
    @again bra sleep;
    mov.u32 $0, $1;
}""")


@triton.jit
def _late_copy_kernel(
    source, target, count, SLEEP_NS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.arange(0, BLOCK)
    zero = i * 0
    # Every element of the tile is 0 once the thread that holds it has slept.
    zero = tl.inline_asm_elementwise(
        SLEEP,
        "=r,r,l",
        [zero, (zero + SLEEP_NS).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    for at in range(0, count, BLOCK):
        inside = at + i < count
        value = tl.load(source + at + i + zero, mask=inside)
        tl.store(target + at + i + zero, value, mask=inside)


@triton.jit
def _hasty_copy_kernel(source, target, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Does not wait: a control."""
    i = tl.arange(0, BLOCK)
    for at in range(0, count, BLOCK):
        inside = at + i < count
        tl.store(target + at + i, tl.load(source + at + i, mask=inside), mask=inside)


def late_copy(source: Tensor, target: Tensor) -> None:
    """Copies, late; whatever is launched next with dependent launch starts at once."""
    assert source.is_contiguous() and target.is_contiguous() and source.dtype == target.dtype
    options = {"SLEEP_NS": SLEEP_NS, "BLOCK": 128, "PDL": True, "launch_pdl": True}
    _late_copy_kernel[(1,)](source, target, source.numel(), num_warps=4, **options)


def hasty_copy(source: Tensor) -> Tensor:
    """Returns what a kernel reads that does not wait for its predecessor."""
    target = torch.empty_like(source)
    options = {"BLOCK": 128, "PDL": True, "launch_pdl": True}
    _hasty_copy_kernel[(1,)](source, target, source.numel(), num_warps=4, **options)
    return target
