"""Matrix products of few rows in Triton, at the speed at which weights can be read.

A decode step is a chain of such products with small kernels between them, and each kernel waits
for the one before. Weights wait for nobody: under programmatic dependent launch a program is
started while its predecessors still run, loads the weights it will need first, and only then
waits for its input. So the memory keeps reading through norms and attention.

For a single row, by multiply-add in registers: `vector`, a program a few outputs. For up to
`ROWS_MAX` rows, on the tensor cores: `tiles`, a program a tile or a part of its sum over K. The
last of the programs that share a tile to finish adds the parts up in a fixed order, so that a
result does not depend on who was last.
"""

# M rows · N outputs · K inputs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.matmul.settings import Setting
from headrace.ops.triton import Gpu

# Thread t asks for the first bytes of row t. Operands: address, rows, bytes a row, bytes asked.
_ASK_FOR_ROWS = tl.constexpr(
    """{
    .reg .pred mine;
    .reg .b32 row;
    .reg .b64 from;
    mov.u32 row, %tid.x;
    setp.lt.s32 mine, row, $2;
    mul.wide.s32 from, row, $3;
    add.s64 from, from, $1;
    @mine cp.async.bulk.prefetch.L2.global [from], $4;
    mov.u32 $0, 0;
    }"""
)


@triton.jit
def prefetch(w, rows, row_bytes, asked_bytes):
    """Asks the L2 for the first `asked_bytes` of `rows` rows (at most one a thread) from `w` on.

    All numbers of bytes and the address are multiples of 16.
    """
    rows = tl.where(asked_bytes > 0, rows, 0)
    tl.inline_asm_elementwise(
        _ASK_FOR_ROWS,  # pyright: ignore[reportArgumentType]
        "=r,l,r,r,r",
        [
            w.to(tl.int64),
            tl.cast(rows, tl.int32),
            tl.cast(row_bytes, tl.int32),
            tl.cast(asked_bytes, tl.int32),
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _silu_mul(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, rounded where the composition of product and activation rounds."""
    gate = gate.to(dtype).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return gate * up.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["asked_bytes"])
def vector(  # noqa: PLR0912, PLR0915
    x,
    x_scales,
    w,
    scales,
    bias,
    y,
    N,
    K,
    asked_bytes,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    LATE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[N] = w[N, K] @ x[K] + bias[N]; gated: y[N] = silu(w[:N] @ x) * (w[N:] @ x), w [2 N, K].

    Args:
        x_scales: float32 [M], what a row of x is multiplied with; None for one.
        w: of the dtype of x, or numbers of 8 bits.
        scales: float32 [N], gated [2 N], what a row of w is multiplied with; None for one.
        asked_bytes: of each row of its weights, what a program asks for before it waits for x,
            if PREFETCH; a multiple of 16.
        AHEAD: whether the first step's weights are loaded before the wait for x.
        LATE: whether dependents start when the sums are complete, not at once.
    """
    BYTES: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
    n0 = tl.program_id(0) * BN
    rows = tl.minimum(BN, N - n0)
    w += n0.to(tl.int64) * K
    w_up = w + tl.cast(N, tl.int64) * K
    if PDL and not LATE:
        gdc_launch_dependents()
    if PREFETCH:
        asked_bytes = tl.minimum(asked_bytes, BYTES * K)
        prefetch(w, rows, BYTES * K, asked_bytes)
        if GATED:
            prefetch(w_up, rows, BYTES * K, asked_bytes)
    n = tl.arange(0, BN)[:, None]
    k = tl.arange(0, BK)[None, :]
    x_other = None if EVEN_K else 0.0
    w_other = None if EVEN_N and EVEN_K else 0.0
    ahead_nk = None
    ahead_up_nk = None
    if AHEAD:
        mask = None if EVEN_N and EVEN_K else (n < rows) & (k < K)
        ahead_nk = tl.load(w + n * K + k, mask, w_other, eviction_policy="evict_first")
        if GATED:
            ahead_up_nk = tl.load(w_up + n * K + k, mask, w_other, eviction_policy="evict_first")
    if PDL:
        gdc_wait()

    acc = tl.zeros([BN, BK], tl.float32)
    acc_up = tl.zeros([BN, BK], tl.float32)
    if AHEAD:
        first_k = tl.load(x + k, None if EVEN_K else k < K, x_other).to(tl.float32)
        acc = tl.cast(ahead_nk, tl.float32) * first_k
        if GATED:
            acc_up = tl.cast(ahead_up_nk, tl.float32) * first_k
    for k0 in tl.range(BK if AHEAD else 0, K, BK, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        x_mask = None if EVEN_K else k0 + k < K
        w_mask = None if EVEN_N and EVEN_K else (n < rows) & (k0 + k < K)
        x_k = tl.load(x + k0 + k, x_mask, x_other).to(tl.float32)
        at = n * K + k0 + k
        w_nk = tl.load(w + at, w_mask, w_other, eviction_policy="evict_first")
        acc += w_nk.to(tl.float32) * x_k
        if GATED:
            w_nk = tl.load(w_up + at, w_mask, w_other, eviction_policy="evict_first")
            acc_up += w_nk.to(tl.float32) * x_k
    if PDL and LATE:
        gdc_launch_dependents()

    i = tl.arange(0, BN)
    total = tl.sum(acc, 1)
    total_up = tl.sum(acc_up, 1)
    if x_scales is not None:
        x_scale = tl.load(x_scales)
        total *= x_scale
        total_up *= x_scale
    if scales is not None:
        total *= tl.load(scales + n0 + i, mask=i < rows, other=0.0)
        if GATED:
            total_up *= tl.load(scales + N + n0 + i, mask=i < rows, other=0.0)
    if GATED:
        total = _silu_mul(total, total_up, y.dtype.element_ty)
    if bias is not None:
        total += tl.load(bias + n0 + i, mask=i < rows, other=0.0).to(tl.float32)
    tl.store(y + n0 + i, total.to(y.dtype.element_ty), mask=i < rows)


@triton.jit
def _dot(x_mk, w_nk, acc, SWAP: tl.constexpr):
    """acc + the product; [BN, MB] if swapped, [MB, BN] otherwise."""
    w_nk = w_nk.to(x_mk.dtype)
    return tl.dot(w_nk, tl.trans(x_mk), acc) if SWAP else tl.dot(x_mk, tl.trans(w_nk), acc)


@triton.jit
def sum_and_store(
    acc,
    bias,
    y,
    parts,
    arrived,
    tile,
    part,
    n0,
    M,
    N,
    MB: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Stores a tile of the product; of SPLIT programs that share its sum, the last to arrive.

    Arguments are those of `tiles`.
    """
    rows = tl.minimum(BN, N - n0)
    m = tl.arange(0, MB)
    n = tl.arange(0, BN)
    m = m[None, :] if SWAP else m[:, None]
    n = n[:, None] if SWAP else n[None, :]
    mask = (m < M) & (n < rows)
    y += n0 + m * N + n  # at most 64 rows: fits 31 bits
    if SPLIT > 1:
        size: tl.constexpr = MB * BN
        mine = parts + tile * (SPLIT * size) + (n * MB + m if SWAP else m * BN + n)
        tl.store(mine + part * size, acc)
        # All threads have stored before one of them says so; the last to arrive sees all parts.
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            tl.store(arrived + tile, 0)
            acc = tl.zeros([BN, MB] if SWAP else [MB, BN], tl.float32)
            for i in tl.static_range(SPLIT):  # pyright: ignore[reportGeneralTypeIssues]
                acc += tl.load(mine + i * size, cache_modifier=".cg")
            if bias is not None:
                acc += tl.load(bias + n0 + n, mask=n < rows, other=0.0).to(tl.float32)
            tl.store(y, acc.to(y.dtype.element_ty), mask=mask)
    else:
        if bias is not None:
            acc += tl.load(bias + n0 + n, mask=n < rows, other=0.0).to(tl.float32)
        tl.store(y, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "asked_bytes"])
def tiles(  # noqa: PLR0912, PLR0915
    x,
    x_scales,
    w,
    scales,
    bias,
    y,
    parts,
    arrived,
    M,
    N,
    K,
    x_stride,
    asked_bytes,
    MB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    LATE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[M, N] = x[M, K] @ w[N, K].T + bias[N], for M <= MB; gated as in `vector`.

    Args:
        x_scales, w, scales: as in `vector`.
        parts: float32 [tiles of N, SPLIT, MB * BN], scratch; unused if SPLIT is 1.
        arrived: int32 [tiles of N], zero before and after; unused if SPLIT is 1.
        SWAP: whether the weight's rows are the tensor cores' rows (64 of them on Hopper).
        asked_bytes: of each row of its weights, what a program asks for before it waits for x,
            if PREFETCH; a multiple of 16.
        AHEAD: whether the first step's weights are loaded before the wait for x.
        LATE: whether dependents start when the sums are complete, not at once.
    """
    BYTES: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    n0 = tile * BN
    rows = tl.minimum(BN, N - n0)
    k_part = tl.cdiv(K, BK * SPLIT) * BK
    k_first = part * k_part
    k_last = tl.minimum(k_first + k_part, K)
    w += n0.to(tl.int64) * K
    w_up = w + tl.cast(N, tl.int64) * K
    if PDL and not LATE:
        gdc_launch_dependents()
    if PREFETCH:
        asked_bytes = tl.minimum(asked_bytes, BYTES * (k_last - k_first))
        prefetch(w + k_first, rows, BYTES * K, asked_bytes)
        if GATED:
            prefetch(w_up + k_first, rows, BYTES * K, asked_bytes)
    m = tl.arange(0, MB)
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)
    w_other = None if EVEN_N and EVEN_K else 0.0
    ahead_nk = None
    ahead_up_nk = None
    if AHEAD:
        there = None if EVEN_N and EVEN_K else (n < rows)[:, None] & (k_first + k < K)[None, :]
        ahead = n[:, None] * K + (k_first + k)[None, :]
        ahead_nk = tl.load(w + ahead, there, w_other, eviction_policy="evict_first")
        if GATED:
            ahead_up_nk = tl.load(w_up + ahead, there, w_other, eviction_policy="evict_first")
    if PDL:
        gdc_wait()

    acc = tl.zeros([BN, MB] if SWAP else [MB, BN], tl.float32)
    acc_up = tl.zeros([BN, MB] if SWAP else [MB, BN], tl.float32)
    if AHEAD:
        first = x + m[:, None] * x_stride + (k_first + k)[None, :]
        first_mk = tl.load(first, (m < M)[:, None] & (k_first + k < K)[None, :], 0.0)
        acc = _dot(first_mk, ahead_nk, acc, SWAP)
        if GATED:
            acc_up = _dot(first_mk, ahead_up_nk, acc_up, SWAP)
        k_first += BK
    for k0 in tl.range(k_first, k_last, BK, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        x_mask = (m < M)[:, None]
        if not EVEN_K:
            x_mask = x_mask & (k0 + k < K)[None, :]
        w_mask = None if EVEN_N and EVEN_K else (n < rows)[:, None] & (k0 + k < K)[None, :]
        x_mk = tl.load(x + m[:, None] * x_stride + (k0 + k)[None, :], x_mask, 0.0)
        at = n[:, None] * K + (k0 + k)[None, :]
        w_nk = tl.load(w + at, w_mask, w_other, eviction_policy="evict_first")
        acc = _dot(x_mk, w_nk, acc, SWAP)
        if GATED:
            w_nk = tl.load(w_up + at, w_mask, w_other, eviction_policy="evict_first")
            acc_up = _dot(x_mk, w_nk, acc_up, SWAP)
    if PDL and LATE:
        gdc_launch_dependents()

    if x_scales is not None:
        x_scale = tl.load(x_scales + m, m < M, 0.0)
        x_scale = x_scale[None, :] if SWAP else x_scale[:, None]
        acc *= x_scale
        if GATED:
            acc_up *= x_scale
    if scales is not None:
        n = n[:, None] if SWAP else n[None, :]
        acc *= tl.load(scales + n0 + n, mask=n < rows, other=0.0)
        if GATED:
            acc_up *= tl.load(scales + N + n0 + n, mask=n < rows, other=0.0)
    if GATED:
        acc = _silu_mul(acc, acc_up, y.dtype.element_ty)
    sum_and_store(acc, bias, y, parts, arrived, tile, part, n0, M, N, MB, BN, SPLIT, SWAP)


class Scratch:
    """What programs that share a sum leave for one another.

    One kernel uses it at a time: products of one device run on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.parts = torch.empty(0, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self, setting: Setting, outputs: int) -> None:
        """Makes room for a product; never while a graph exists that has been recorded with it."""
        if setting.rows == 1 or setting.split == 1:
            return
        columns = triton.cdiv(outputs, setting.block_n)
        size = columns * setting.split * setting.rows * setting.block_n
        if self.parts.numel() < size:
            self.parts = self.parts.new_empty(size)
        if self.arrived.numel() < columns:
            self.arrived = self.arrived.new_zeros(columns)


def product(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    setting: Setting,
    scratch: Scratch,
    gpu: Gpu,
    out_MN: Tensor | None = None,
    scales_N: Tensor | None = None,
    x_scales_M: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns x_MK @ weight_NK.T + bias_N; of a gated setting silu(gate) * up, [M, N / 2].

    Args:
        x_MK: at most `setting.rows` rows, bfloat16, float16, or float8 like the weight.
        weight_NK: contiguous, of the dtype of `x_MK`, or float8 or int8, which become that dtype
            in registers; of a gated setting gate's rows, then up's.
        scratch: with room for the setting, if that is split.
        out_MN: where the product goes, contiguous; None: it is new.
        scales_N: float32, what each row of the weight is multiplied with; None for one.
        x_scales_M: float32, what each row of `x_MK` is multiplied with; None for one.
        dtype: of a new result; None: that of `x_MK`.
    """
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    (M, K), N = x_MK.shape, weight_NK.shape[0]
    N = N // 2 if setting.gated else N
    assert setting.rows >= M, "a setting is chosen by the number of rows"
    y_MN = out_MN
    if y_MN is None:
        y_MN = torch.empty((M, N), dtype=dtype or x_MK.dtype, device=x_MK.device)
    columns = triton.cdiv(N, setting.block_n)
    constants = {
        "BN": setting.block_n,
        "BK": setting.block_k,
        "EVEN_N": N % setting.block_n == 0,
        "EVEN_K": K % setting.block_k == 0,
        "STAGES": setting.stages,
        "LATE": setting.late,
        "GATED": setting.gated,
        "AHEAD": setting.ahead,
        "PREFETCH": setting.prefetch > 0 and gpu.pdl and K % 16 == 0,
    }
    grid = (columns * setting.split,)
    weight_rows = 2 * setting.block_n if setting.gated else setting.block_n
    asked_bytes = setting.prefetch * 1024 // weight_rows // 16 * 16
    if setting.rows == 1:
        args = (x_MK, x_scales_M, weight_NK, scales_N, bias_N, y_MN, N, K, asked_bytes)
        gpu.run(vector, grid, *args, warps=setting.warps, **constants)
        return y_MN
    constants |= {"MB": setting.rows, "SPLIT": setting.split, "SWAP": setting.swap}
    sums = (scratch.parts, scratch.arrived)
    args = (
        x_MK,
        x_scales_M,
        weight_NK,
        scales_N,
        bias_N,
        y_MN,
        *sums,
        M,
        N,
        K,
        x_MK.stride(0),
        asked_bytes,
    )
    gpu.run(tiles, grid, *args, warps=setting.warps, **constants)
    return y_MN
