"""Paged attention of rows with any number of query tokens, in Triton.

What runs where FlashAttention-3 does not: on other devices than Hopper, and in float32. A program
attends with one head to a tile of a row's queries. (Online softmax: Dao, FlashAttention-2, 2023.)
"""

# The types of Triton's language are not those that its kernels are called with.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

# S rows · T tokens · H query heads · K kv heads · E head dim · N blocks · P tokens per block
# B blocks per table row

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.kv_write.base import UNIT, KvScales
from headrace.ops.paged_attention.base import StepShape
from headrace.ops.triton import Gpu


@dataclass(frozen=True)
class PrefillConfig:
    """How the kernel is compiled."""

    queries: int  # of a tile
    tile: int  # positions of a tile of keys
    warps: int
    stages: int


def default_config(dtype: torch.dtype, head_dim: int, gpu: Gpu) -> PrefillConfig:
    """Tiles that fit the registers and the shared memory of every device from Ampere on."""
    if dtype == torch.float32:
        side = 32 if head_dim <= 64 else 16
        return PrefillConfig(queries=side, tile=side, warps=4, stages=1)
    if head_dim > 128:
        return PrefillConfig(queries=64, tile=32, warps=4, stages=2)
    if gpu.capability == (9, 0):
        return PrefillConfig(queries=128, tile=64, warps=8, stages=3)
    return PrefillConfig(queries=64, tile=64, warps=4, stages=2)


@dataclass(frozen=True)
class PrefillPlan:
    """The prefill rows of a step."""

    rows: int
    longest: int  # query tokens of the longest row
    first_S1: Tensor  # int32, tokens before each row and after the last
    kv_len_S: Tensor  # int32
    table_SB: Tensor  # int32
    block_tokens: int


class TritonPrefill:
    """Attends to the rows of a step behind its decode rows."""

    reads_fresh = False

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        gpu: Gpu,
        config: PrefillConfig | None = None,
    ) -> None:
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._dtype = dtype
        self._gpu = gpu
        self._config = config or default_config(dtype, head_dim, gpu)

    def plan(self, shape: StepShape) -> PrefillPlan:
        """Launches nothing."""
        assert shape.first_S1 is not None and shape.kv_len_S is not None
        rows = slice(shape.decode_rows, None)
        length_S = shape.row_len_S[rows]
        return PrefillPlan(
            rows=len(length_S),
            longest=int(length_S.max()),
            first_S1=shape.first_S1[rows],
            kv_len_S=shape.kv_len_S[rows],
            table_SB=shape.table_SB[rows],
            block_tokens=shape.block_tokens,
        )

    def attend(
        self,
        q_THE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        o_THE: Tensor,
        plan: PrefillPlan,
        *,
        window: int = 0,
        softcap: float = 0.0,
        fresh: tuple[Tensor, Tensor] | None = None,
        scales: KvScales = UNIT,
    ) -> None:
        """Writes the prefill rows of `o_THE`, which is contiguous; one launch."""
        del fresh
        scale = scales.k * self._head_dim**-0.5
        if softcap > 0.0:
            scale_in, scale_out = scale / softcap, softcap * math.log2(math.e)
        else:
            scale_in, scale_out = scale * math.log2(math.e), 1.0
        grid = (self._heads, triton.cdiv(plan.longest, self._config.queries), plan.rows)
        _prefill_kernel[grid](
            q_THE,
            k_cache_NPKE,
            v_cache_NPKE,
            o_THE,
            plan.table_SB,
            plan.first_S1,
            plan.kv_len_S,
            q_THE.stride(0),
            plan.table_SB.stride(0),
            scale_in,
            scale_out,
            scales.v,
            window,
            BLOCK_TOKENS=plan.block_tokens,
            SOFTCAP=softcap > 0.0,
            WINDOW=window > 0,
            **self._constants,
        )

    @cached_property
    def _constants(self) -> dict[str, int | str | bool]:
        return {
            "HEADS": self._heads,
            "KV_HEADS": self._kv_heads,
            "HEAD_DIM": self._head_dim,
            "DIM": max(16, triton.next_power_of_2(self._head_dim)),
            "QUERIES": self._config.queries,
            "TILE": self._config.tile,
            "STAGES": self._config.stages,
            "PRECISION": "ieee" if self._dtype == torch.float32 else "tf32",
            "num_warps": self._config.warps,
            **self._gpu.launch,
        }


@triton.jit(
    do_not_specialize=["table_stride", "window"],
    do_not_specialize_on_alignment=["table_SB", "first_S1", "kv_len_S"],
)
def _prefill_kernel(  # noqa: PLR0915
    q_THE,
    k_cache_NPKE,
    v_cache_NPKE,
    o_THE,
    table_SB,
    first_S1,
    kv_len_S,
    q_stride,
    table_stride,
    scale_in,
    scale_out,
    v_scale,
    window,
    BLOCK_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM, padded to a power of two
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attends to all that a tile of queries sees with one head; heads of a tile are neighbours."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0)
    row = tl.program_id(2)
    first = tl.load(first_S1 + row).to(tl.int64)
    length = (tl.load(first_S1 + row + 1) - first).to(tl.int32)
    kv_len = tl.load(kv_len_S + row)
    # A row's last queries see the most: they begin first.
    begin = (tl.cdiv(length, QUERIES) - 1 - tl.program_id(1)) * QUERIES
    if begin < 0:
        return
    kv_head = head // (HEADS // KV_HEADS)
    start = kv_len - length
    query = begin + tl.arange(0, QUERIES)
    query_position = start + query
    dim = tl.arange(0, DIM)
    is_dim = dim < HEAD_DIM
    query_mask = (query < length)[:, None] & is_dim[None, :]
    token = first + query
    q = tl.load(
        q_THE + (token * q_stride + head * HEAD_DIM)[:, None] + dim[None, :],
        mask=query_mask,
        other=0.0,
    )
    tile_first = 0
    if WINDOW:
        tile_first = tl.maximum(start + begin + 1 - window, 0) // TILE
    tile_end = tl.cdiv(tl.minimum(start + begin + QUERIES, kv_len), TILE)

    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, DIM], tl.float32)
    for tile in tl.range(tile_first, tile_end, num_stages=STAGES):
        position = tile * TILE + tl.arange(0, TILE)
        in_row = position < kv_len
        block = tl.load(
            table_SB + row.to(tl.int64) * table_stride + position // BLOCK_TOKENS,
            mask=in_row,
            other=0,
        )
        # Pools hold more than 2^31 numbers.
        cell = block.to(tl.int64) * BLOCK_TOKENS + position % BLOCK_TOKENS
        number = (cell * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
        # What is not seen may hold anything, and NaN times a weight of zero were NaN.
        cell_mask = in_row[:, None]
        if DIM != HEAD_DIM:
            cell_mask = cell_mask & is_dim[None, :]
        k = tl.load(k_cache_NPKE + number, mask=cell_mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_in
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1)
            scores = (1.0 - 2.0 / (tl.exp2(scores * 2.885390081777927) + 1.0)) * scale_out
        is_seen = position[None, :] <= query_position[:, None]
        if WINDOW:
            is_seen = is_seen & (position[None, :] > query_position[:, None] - window)
        scores = tl.where(is_seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # With a window a query may see nothing of the first tiles.
        shift = new_top
        if WINDOW:
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        v = tl.load(v_cache_NPKE + number, mask=cell_mask, other=0.0).to(q.dtype)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None]
        sums = tl.dot(weights.to(q.dtype), v, sums, input_precision=PRECISION)
        top = new_top
    out = o_THE + ((token * HEADS + head) * HEAD_DIM)[:, None] + dim[None, :]
    tl.store(out, (sums * (v_scale / total)[:, None]).to(o_THE.dtype.element_ty), mask=query_mask)
