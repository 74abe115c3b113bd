"""Triton kernels of products with coded weights: codes become numbers in registers.

Bytes are read once, whatever the number of rows up to `ROWS_MAX`; a byte of two codes makes two
products, with the even and with the odd columns of the input.
"""

# M rows · N outputs · K inputs as the codes have them · G groups of inputs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# What a code is; those of four bits come first.
NUMBERS4 = tl.constexpr(0)
VALUES4 = tl.constexpr(1)
NUMBERS8 = tl.constexpr(2)
FLOATS = tl.constexpr(3)


@triton.jit
def _numbers(codes, values, KIND: tl.constexpr):
    """The numbers that codes stand for, float32."""
    # One return: what stands behind one is compiled nevertheless.
    if KIND == VALUES4:
        numbers = tl.load(values + codes.to(tl.int32))
    elif KIND == FLOATS:
        numbers = codes.to(tl.float32)
    else:
        numbers = codes.to(tl.int32).to(tl.float32)
    return numbers


@triton.jit(do_not_specialize=["M"])
def coded_tiles_kernel(
    x,
    codes,
    scales,
    zeros,
    values,
    bias,
    y,
    M,
    N,
    K,
    G,
    group,
    x_stride,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    MB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[M, N] = x[M, K] @ w[N, K].T + bias[N], for M <= MB.

    Args:
        codes: of four bits uint8 [N, K / 2], else [N, K].
        scales, zeros: float32 [N, G]; zeros only if ZEROS.
        values: float32 [16] of VALUES4.
        group: inputs that share a scale; a multiple of BK, or all that there are.
        BK: inputs a step of the loop.
    """
    n0 = tl.program_id(0) * BN
    n = tl.arange(0, BN)
    there_n = n0 + n < N
    m = tl.arange(0, MB)
    HALVES: tl.constexpr = KIND <= VALUES4
    PER: tl.constexpr = 2 if HALVES else 1  # pyright: ignore[reportAssignmentType]
    WIDTH: tl.constexpr = BK // PER
    b = tl.arange(0, WIDTH)
    row = (n0 + n).to(tl.int64)
    codes += row[:, None] * (K // PER)
    scales += row * G
    zeros += row * G
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([MB, BN], tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        at = k0 // PER + b
        there_b = at < K // PER
        packed = tl.load(
            codes + at[None, :],
            there_n[:, None] & there_b[None, :],
            other=0.0 if KIND == FLOATS else 0,
            eviction_policy="evict_first",
        )
        scale = tl.load(scales + k0 // group, there_n, 0.0)
        zero = tl.zeros([BN], tl.float32)
        if ZEROS:
            zero = tl.load(zeros + k0 // group, there_n, 0.0)
        x_mask = (m < M)[:, None] & there_b[None, :]
        x_at = x + m[:, None] * x_stride + (at * PER)[None, :]
        x_mk = tl.load(x_at, x_mask, 0.0)
        low = packed & 15 if HALVES else packed
        w = (_numbers(low, values, KIND) - zero[:, None]) * scale[:, None]
        acc = tl.dot(x_mk, tl.trans(w.to(x_mk.dtype)), acc, input_precision="ieee")
        if HALVES:
            x_mk = tl.load(x_at + 1, x_mask, 0.0)
            w = (_numbers(packed >> 4, values, KIND) - zero[:, None]) * scale[:, None]
            acc = tl.dot(x_mk, tl.trans(w.to(x_mk.dtype)), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + n0 + n, there_n, 0.0).to(tl.float32)[None, :]
    y += m[:, None] * N + (n0 + n)[None, :]
    tl.store(y, acc.to(y.dtype.element_ty), (m < M)[:, None] & there_n[None, :])


@triton.jit
def widen_kernel(
    codes,
    scales,
    zeros,
    values,
    w,
    N,
    K,
    G,
    group,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """w[N, K] = the weight itself; a program a tile [BN, BK], arguments as of the kernel above."""
    HALVES: tl.constexpr = KIND <= VALUES4
    PER: tl.constexpr = 2 if HALVES else 1  # pyright: ignore[reportAssignmentType]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    at = tl.program_id(1) * (BK // PER) + tl.arange(0, BK // PER)
    there = (n < N)[:, None] & (at < K // PER)[None, :]
    none = 0.0 if KIND == FLOATS else 0
    packed = tl.load(codes + n[:, None] * (K // PER) + at[None, :], there, other=none)
    of_group = n[:, None] * G + (at * PER // group)[None, :]
    scale = tl.load(scales + of_group, there, 0.0)
    zero = tl.load(zeros + of_group, there, 0.0) if ZEROS else 0.0
    low = packed & 15 if HALVES else packed
    first = (_numbers(low, values, KIND) - zero) * scale
    w += n[:, None] * K + (at * PER)[None, :]
    tl.store(w, first.to(w.dtype.element_ty), there)
    if HALVES:
        second = (_numbers(packed >> 4, values, KIND) - zero) * scale
        tl.store(w + 1, second.to(w.dtype.element_ty), there)
