"""Products of few rows with codes of four bits in groups of inputs, at the speed of reading.

The tensor cores multiply 16-bit numbers. Two bit operations make one of an integer: a byte 0x43
above it is 128 + code in bfloat16, 0x64 is 1024 + code in float16; subtracting 128 or 1024 and the
zero point at once is exact. Of a code that stands for one of 16 values, the bytes are picked from
registers that hold all 16: an instruction picks four of eight, and the codes are its selector. A
group's sums are scaled, not its weights.

Codes are stored tile by tile: 64 outputs by 128 inputs are 4096 bytes in a row, of which byte b of
an output holds inputs b and b + 64, so that both halves multiply neighbouring inputs. In groups of
64 each half is one.
"""

# M rows · N outputs · K inputs · G groups of inputs

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.matmul.settings import ROWS_MAX, Setting, bucket_of
from headrace.ops.matmul.skinny import Scratch, prefetch, sum_and_store
from headrace.ops.quant_matmul.base import CodedWeight, Kind
from headrace.ops.quant_matmul.settings import best_groups, best_values
from headrace.ops.triton import PDL_CAPABILITY, Gpu

TILE_N, TILE_K = 64, 128
BN, BK, HALF = tl.constexpr(TILE_N), tl.constexpr(TILE_K), tl.constexpr(TILE_K // 2)
TILE_BYTES = tl.constexpr(TILE_N * TILE_K // 2)

# Four bytes of two codes each, and what is subtracted from each number, become four numbers of the
# lower halves and four of the upper ones.
_WIDEN = """{{
    .reg .b32 low, high;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    prmt.b32 $0, low, {base}, 0x4140;
    prmt.b32 $1, low, {base}, 0x4342;
    prmt.b32 $2, high, {base}, 0x4140;
    prmt.b32 $3, high, {base}, 0x4342;
    sub.{kind} $0, $0, $5;
    sub.{kind} $1, $1, $6;
    sub.{kind} $2, $2, $5;
    sub.{kind} $3, $3, $6;
    }}"""
_WIDEN_BF16 = tl.constexpr(_WIDEN.format(base="0x43434343", kind="bf16x2"))
_WIDEN_FP16 = tl.constexpr(_WIDEN.format(base="0x64646464", kind="f16x2"))
# What a byte above a code adds to it, by the dtype that both make.
BASES = {torch.bfloat16: 128, torch.float16: 1024}

# Four bytes of two codes each become four values of the lower halves and four of the upper ones.
# Bytes 0 and 1 hold a selector of four codes, in the order lower, upper, lower, upper; bytes 2 and
# 3 another. Both halves of the table are asked, and the code's upper bit chooses between them.
# Words of values come as often as bytes are packed: of each four one is used.
_PICK = """{
    .reg .b32 code, half, few, many, lows, highs, lows_2, highs_2;
    and.b32 code, $4, 0x77777777;
    shr.u32 half, $4, 1;
    lop3.b32 half, half, 0x44444444, 0x32103210, 0xea;
    prmt.b32 few, $5, $9, code;
    prmt.b32 many, $13, $17, code;
    prmt.b32 lows, few, many, half;
    prmt.b32 few, $21, $25, code;
    prmt.b32 many, $29, $33, code;
    prmt.b32 highs, few, many, half;
    shr.u32 code, code, 16;
    shr.u32 half, half, 16;
    prmt.b32 few, $5, $9, code;
    prmt.b32 many, $13, $17, code;
    prmt.b32 lows_2, few, many, half;
    prmt.b32 few, $21, $25, code;
    prmt.b32 many, $29, $33, code;
    prmt.b32 highs_2, few, many, half;
    prmt.b32 $0, lows, highs, 0x6240;
    prmt.b32 $1, lows_2, highs_2, 0x6240;
    prmt.b32 $2, lows, highs, 0x7351;
    prmt.b32 $3, lows_2, highs_2, 0x7351;
    }"""
_PICK_ASM = tl.constexpr(_PICK)
_PICK_OPERANDS = tl.constexpr(",".join(["=r"] * 4 + ["r"] * (1 + 4 * 8)))


@triton.jit
def _picked(packed, table, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The values that the lower and the upper halves stand for.

    Args:
        packed: uint8, any shape.
        table: float32 [16]; with ASM int32 [8], of `words`.
    """
    if ASM:
        w0, _ = tl.broadcast(tl.load(table), packed)
        w1, _ = tl.broadcast(tl.load(table + 1), packed)
        w2, _ = tl.broadcast(tl.load(table + 2), packed)
        w3, _ = tl.broadcast(tl.load(table + 3), packed)
        w4, _ = tl.broadcast(tl.load(table + 4), packed)
        w5, _ = tl.broadcast(tl.load(table + 5), packed)
        w6, _ = tl.broadcast(tl.load(table + 6), packed)
        w7, _ = tl.broadcast(tl.load(table + 7), packed)
        bits_low, bits_high = tl.inline_asm_elementwise(
            _PICK_ASM,  # pyright: ignore[reportArgumentType]
            _PICK_OPERANDS,  # pyright: ignore[reportArgumentType]
            [packed, w0, w1, w2, w3, w4, w5, w6, w7],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
        low = bits_low.to(DTYPE, bitcast=True)  # pyright: ignore[reportArgumentType]
        high = bits_high.to(DTYPE, bitcast=True)  # pyright: ignore[reportArgumentType]
    else:
        low = tl.load(table + (packed & 15).to(tl.int32)).to(DTYPE)
        high = tl.load(table + (packed >> 4).to(tl.int32)).to(DTYPE)
    return low, high


@triton.jit
def _widened(packed, less, ASM: tl.constexpr):
    """The numbers of the lower and of the upper halves, in the dtype of `less`.

    Args:
        packed: uint8, any shape.
        less: bfloat16 or float16 of that shape: zero point and base.
    """
    if not ASM:
        base: tl.constexpr = 128.0 if less.dtype == tl.bfloat16 else 1024.0  # pyright: ignore[reportAssignmentType]
        zero = less.to(tl.float32) - base
        low = ((packed & 15).to(tl.float32) - zero).to(less.dtype)
        high = ((packed >> 4).to(tl.float32) - zero).to(less.dtype)
    elif less.dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _WIDEN_BF16,  # pyright: ignore[reportArgumentType]
            "=r,=r,=r,=r,r,r,r",
            [packed, less],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = tl.inline_asm_elementwise(
            _WIDEN_FP16,  # pyright: ignore[reportArgumentType]
            "=r,=r,=r,=r,r,r,r",
            [packed, less],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def _numbers(
    packed,
    scales,
    less,
    table,
    of_group,
    columns,
    DTYPE: tl.constexpr,
    LESS: tl.constexpr,
    HALVED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Of a tile: its numbers without their scales, lower and upper half, and the scales of both.

    Args:
        of_group: where the scales of the tile's (first) group are, [BN].
        columns: from a group's scales to the next one's.
    """
    low_scale = tl.load(scales + of_group).to(tl.float32)
    high_scale = low_scale
    if HALVED:
        high_scale = tl.load(scales + of_group + columns).to(tl.float32)
    if table is not None:
        low, high = _picked(packed, table, DTYPE, ASM)
    elif less is None:
        minus, _ = tl.broadcast(tl.full([BN, 1], LESS, DTYPE), packed)
        low, high = _widened(packed, minus, ASM)
    else:
        minus, _ = tl.broadcast(tl.load(less + of_group)[:, None], packed)
        low, high = _widened(packed, minus, ASM)
        if HALVED:
            minus, _ = tl.broadcast(tl.load(less + of_group + columns)[:, None], packed)
            _, high = _widened(packed, minus, ASM)
    return low, high, low_scale, high_scale


@triton.jit(do_not_specialize=["M", "asked_tiles"])
def groups4(
    x,
    codes,
    scales,
    less,
    table,
    bias,
    y,
    parts,
    arrived,
    M,
    N,
    K,
    group,
    x_stride,
    asked_tiles,
    LESS: tl.constexpr,
    MB: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    LATE: tl.constexpr,
    HALVED: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[M, N] = x[M, K] @ w[N, K].T + bias[N], for M <= MB.

    Args:
        codes: uint8, tile by tile, whole tiles.
        scales: float32 or float16 [G, N rounded up to tiles].
        less: of the dtype of x, the same shape: zero points and base; None: LESS for all groups.
        table: of codes that stand for values; see `_picked`. Nothing is subtracted from those.
        K: a multiple of 128, as is `group`; with HALVED that is 64.
        parts, arrived, SPLIT, SWAP, LATE: as of `skinny.tiles`.
        asked_tiles: tiles that a program asks for before it waits for x, if PREFETCH.
    """
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    steps = K // BK
    per_part = tl.cdiv(steps, SPLIT)
    first = part * per_part
    last = tl.minimum(first + per_part, steps)
    n0 = tile * BN
    columns = tl.cdiv(N, BN) * BN
    codes += (tile * steps + first).to(tl.int64) * TILE_BYTES
    if PDL and not LATE:
        gdc_launch_dependents()
    if PREFETCH:
        asked = tl.minimum(asked_tiles, last - first)
        prefetch(codes, asked, TILE_BYTES, TILE_BYTES)
    if PDL:
        gdc_wait()
    m = tl.arange(0, MB)
    n = tl.arange(0, BN)
    b = tl.arange(0, HALF)
    at = n[:, None] * HALF + b[None, :]
    x_at = x + m[:, None] * x_stride + b[None, :]
    acc = tl.zeros([BN, MB] if SWAP else [MB, BN], tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        packed = tl.load(codes + (i - first) * TILE_BYTES + at, eviction_policy="evict_first")
        of_group = i * BK // group * columns + n0 + n
        low, high, low_scale, high_scale = _numbers(
            packed, scales, less, table, of_group, columns, x.dtype.element_ty, LESS, HALVED, ASM
        )
        x_low = tl.load(x_at + i * BK, (m < M)[:, None], 0.0)
        x_high = tl.load(x_at + i * BK + HALF, (m < M)[:, None], 0.0)
        if SWAP:
            sums = tl.dot(low, tl.trans(x_low))
            if HALVED:
                acc += sums * low_scale[:, None]
                acc += tl.dot(high, tl.trans(x_high)) * high_scale[:, None]
            else:
                acc += tl.dot(high, tl.trans(x_high), sums) * low_scale[:, None]
        else:
            sums = tl.dot(x_low, tl.trans(low))
            if HALVED:
                acc += sums * low_scale[None, :]
                acc += tl.dot(x_high, tl.trans(high)) * high_scale[None, :]
            else:
                acc += tl.dot(x_high, tl.trans(high), sums) * low_scale[None, :]
    if PDL and LATE:
        gdc_launch_dependents()
    sum_and_store(acc, bias, y, parts, arrived, tile, part, n0, M, N, MB, BN, SPLIT, SWAP)


@triton.jit
def widen4(
    codes,
    scales,
    less,
    table,
    w,
    N,
    K,
    group,
    LESS: tl.constexpr,
    HALVED: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """w[N, K] = the weight itself; a program a tile. Arguments as of `groups4`."""
    i = tl.program_id(0)
    tile = tl.program_id(1)
    n = tl.arange(0, BN)
    b = tl.arange(0, HALF)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    codes += (tile * (K // BK) + i).to(tl.int64) * TILE_BYTES
    packed = tl.load(codes + n[:, None] * HALF + b[None, :])
    columns = tl.cdiv(N, BN) * BN
    of_group = i * BK // group * columns + tile * BN + n
    low, high, low_scale, high_scale = _numbers(
        packed, scales, less, table, of_group, columns, w.dtype.element_ty, LESS, HALVED, ASM
    )
    row = (tile * BN + n).to(tl.int64)[:, None]
    w += row * K + i * BK + b[None, :]
    tl.store(w, (low.to(tl.float32) * low_scale[:, None]).to(w.dtype.element_ty), row < N)
    tl.store(w + HALF, (high.to(tl.float32) * high_scale[:, None]).to(w.dtype.element_ty), row < N)


def tiled(codes: Tensor) -> Tensor:
    """Returns codes tile by tile, uint8 [tiles of N, tiles of K, 64, 64].

    Args:
        codes: uint8 [N, K / 2], input 2 j in the lower half of byte j; whole tiles.
    """
    N, K = codes.shape[0], codes.shape[1] * 2
    numbers = codes.new_empty((N, K))
    numbers[:, 0::2] = codes & 15
    numbers[:, 1::2] = codes >> 4
    parted = numbers.view(N // TILE_N, TILE_N, K // TILE_K, 2, TILE_K // 2).transpose(1, 2)
    return (parted[..., 0, :] | parted[..., 1, :] << 4).contiguous()


@dataclass(frozen=True, eq=False)
class Groups:
    """A weight as `groups4` reads it.

    Attributes:
        codes: of `tiled`.
        scales_GN: float16 where that is exact, else float32; N rounded up to whole tiles.
        less_GN: zero points and base, in the activations' dtype; None where all are `less`.
        values: float32 [16], of codes that stand for those; None of integers.
        words: the same as `_picked` wants them, int32 [8].
    """

    codes: Tensor
    scales_GN: Tensor
    less_GN: Tensor | None
    less: float
    group: int
    outputs: int
    inputs: int
    dtype: torch.dtype
    settings: tuple[Setting, ...]
    values: Tensor | None = None
    words: Tensor | None = None

    def table(self, asm: bool) -> Tensor | None:
        """Returns what the kernels are given of the values."""
        return self.words if asm else self.values


def refusal(weight: CodedWeight, dtype: torch.dtype) -> str | None:
    """Why a weight is not read so, or None."""
    if dtype not in BASES:
        return f"activations are {dtype}"
    if weight.kind != Kind.INT4:
        return "codes have eight bits"
    if weight.columns % TILE_K != 0:
        return f"{weight.columns} inputs are no multiple of {TILE_K}"
    halved = weight.group == TILE_K // 2
    if weight.scales_YG.shape[1] > 1 and weight.group % TILE_K != 0 and not halved:
        return (
            f"groups of {weight.group} inputs are neither {TILE_K // 2} nor multiples of {TILE_K}"
        )
    return None


def pack(weight: CodedWeight, dtype: torch.dtype, scratch: Scratch) -> Groups:
    """Stores a weight for `product`, for activations of a dtype; `refusal` has no reason."""
    outputs = weight.outputs
    choose = best_groups if weight.values is None else best_values
    settings = choose(outputs, weight.columns)
    for setting in settings:
        scratch.reserve(setting, outputs)
    beyond = -outputs % TILE_N
    scales_GN = F.pad(weight.scales_YG.float().T, (0, beyond))
    half_GN = scales_GN.half()
    # Of a weight that is not there nothing is known, and the usual is taken for granted.
    if scales_GN.is_meta or torch.equal(half_GN.float(), scales_GN):
        scales_GN = half_GN
    less_GN, less = _less(weight, beyond, dtype)
    return Groups(
        codes=tiled(F.pad(weight.codes, (0, 0, 0, beyond))),
        scales_GN=scales_GN.contiguous(),
        less_GN=less_GN,
        less=less,
        group=weight.columns if weight.scales_YG.shape[1] == 1 else weight.group,
        outputs=outputs,
        inputs=weight.columns,
        dtype=dtype,
        settings=settings,
        values=weight.values,
        words=None if weight.values is None else words(weight.values, dtype),
    )


def words(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 16 values in a dtype of two bytes, the lower bytes before the upper: int32 [8]."""
    return values.to(dtype).view(torch.uint8).view(16, 2).T.contiguous().view(torch.int32).flatten()


def widen(weight: Groups, gpu: Gpu) -> Tensor:
    """Returns weight_NK, new."""
    tiles_n, tiles_k = weight.codes.shape[:2]
    weight_NK = weight.codes.new_empty((weight.outputs, weight.inputs), dtype=weight.dtype)
    asm = gpu.capability >= PDL_CAPABILITY
    gpu.run(
        widen4,
        (tiles_k, tiles_n),
        *(weight.codes, weight.scales_GN, weight.less_GN, weight.table(asm), weight_NK),
        *(weight.outputs, weight.inputs, weight.group),
        LESS=weight.less,
        HALVED=weight.group < TILE_K,
        ASM=asm,
        warps=4,
    )
    return weight_NK


def _less(weight: CodedWeight, beyond: int, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    base = float(BASES[dtype])
    if weight.zeros_YG is None:
        return None, base
    if weight.zeros_YG.is_meta:
        return None, base + 8
    first = float(weight.zeros_YG.flatten()[0])
    if bool((weight.zeros_YG == first).all()):
        return None, base + first
    less_GN = F.pad(weight.zeros_YG.float().T + base, (0, beyond))
    return less_GN.to(dtype).contiguous(), 0.0


def multiply(
    x_MK: Tensor, weight: Groups, bias_N: Tensor | None, scratch: Scratch, gpu: Gpu
) -> Tensor:
    """Returns x_MK @ weight_NK.T + bias_N, new, whatever the number of rows.

    Args:
        x_MK: of any dtype: what is not the weight's becomes it, and back.
    """
    dtype, rows = x_MK.dtype, x_MK.shape[0]
    x_MK = x_MK.to(weight.dtype)
    if rows > ROWS_MAX:
        y_MN = F.linear(x_MK, widen(weight, gpu), bias_N)
    else:
        setting = weight.settings[bucket_of(rows)]
        y_MN = product(x_MK, weight, bias_N, setting, scratch, gpu)
    return y_MN.to(dtype)


def product(
    x_MK: Tensor,
    weight: Groups,
    bias_N: Tensor | None,
    setting: Setting,
    scratch: Scratch,
    gpu: Gpu,
) -> Tensor:
    """Returns x_MK @ weight_NK.T + bias_N, new.

    Args:
        x_MK: at most `setting.rows` rows, of the dtype that the weight was packed for.
        setting: of tiles of 64 outputs and 128 inputs, not gated, nothing loaded ahead.
        scratch: with room for the setting, if that is split.
    """
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    M, N = x_MK.shape[0], weight.outputs
    assert (setting.block_n, setting.block_k) == (TILE_N, TILE_K), "tiles are stored"
    assert setting.rows >= M, "a setting is chosen by the number of rows"
    y_MN = torch.empty((M, N), dtype=x_MK.dtype, device=x_MK.device)
    asm = gpu.capability >= PDL_CAPABILITY
    gpu.run(
        groups4,
        (weight.codes.shape[0] * setting.split,),
        *(x_MK, weight.codes, weight.scales_GN, weight.less_GN, weight.table(asm), bias_N, y_MN),
        *(scratch.parts, scratch.arrived, M, N, weight.inputs, weight.group),
        *(x_MK.stride(0), setting.prefetch * 1024 // TILE_BYTES.value),
        LESS=weight.less,
        MB=setting.rows,
        SPLIT=setting.split,
        SWAP=setting.swap,
        STAGES=setting.stages,
        PREFETCH=setting.prefetch > 0 and gpu.pdl,
        LATE=setting.late,
        HALVED=weight.group < TILE_K,
        ASM=asm,
        warps=setting.warps,
    )
    return y_MN
