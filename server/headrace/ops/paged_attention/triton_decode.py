"""Paged attention of rows with one query token, in Triton: split over KV, balanced on the device.

A step begins with one small kernel that turns the rows' lengths into work items: each is a run of
tiles of one sequence, all about equally long, at most so many as the launch has programs. So a
graph captured once serves any lengths. Every layer is then one launch: the program of an item that
is a whole row writes its output; those of a shared row leave partial sums, and the one that arrives
last adds them up. (Splitting over KV: Dao et al., Flash-Decoding, 2023.)

The query heads of a group are the rows of one tile, so a group's keys and values are read once.
Caches of eight bits are multiplied in float16, which has all their numbers and is what a device
converts them to: queries are scaled before they are rounded to it, not their products.

In a captured step the same launch also rotates queries and keys and writes the cache: the programs
that have the end of a row write its newest cell and are the only ones that read it. (No row reads
another's newest cell, as only full blocks are shared.) The rotation has the bits of the kernel that
only rotates: `ops/rope/triton.py` and this one name the same fused operations.
"""

# The types of Triton's language are not those that its kernels are called with.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false

# S rows · T tokens · H query heads · K kv heads · G query heads a kv head · E head dim
# N blocks · P tokens per block · Z slots · W table width · I work items

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.kv_write.base import UNIT, KvScales, code_max
from headrace.ops.rope.base import QkNorm, QkvLayout
from headrace.ops.rope.triton import saturated
from headrace.ops.triton import Gpu

# Query heads a tile holds: the least that a tensor core takes.
TILE_HEADS = 16
# Integers of a work item.
ITEM = 8
# Items that a program of the scheduling kernel writes.
ITEMS_A_PROGRAM = 16
# Rows the workspace is made for at first; more make a larger one.
ROWS = 512
# Rows that the scheduling kernel is compiled for: few variants, so that few steps compile one.
SCHEDULED = (64, 512)
# Numbers of partial sums that are added up at a time.
COMBINED = 4096
FLOAT16_MAX = tl.constexpr(65504.0)


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel is compiled and how finely the work is cut."""

    tile: int  # positions of a tile
    warps: int
    # Of the loop's pipeline. Block ids go before what they name: 3 and 4 have one tile of keys on
    # its way while another is in use, 5 and 6 have two.
    stages: int
    programs: int  # that a multiprocessor runs at a time
    least: int = 1  # items are not cut shorter than so many tiles, but for evenness


@dataclass(frozen=True)
class Configs:
    """Configurations by the size of a step: its pairs of a row and a kv head."""

    up_to: tuple[tuple[int, DecodeConfig], ...]  # (most pairs, configuration), ascending
    beyond: DecodeConfig

    def of(self, pairs: int) -> DecodeConfig:
        return next((config for most, config in self.up_to if pairs <= most), self.beyond)

    @property
    def all(self) -> tuple[DecodeConfig, ...]:
        return (*(config for _, config in self.up_to), self.beyond)


def default_configs(dtype: torch.dtype, head_dim: int, gpu: Gpu, codes: bool = False) -> Configs:
    """What was fastest on an H200; smaller tiles where numbers or heads are larger.

    Args:
        codes: whether caches keep eight bits: one tile more is on its way then.
    """
    stages = 3 if gpu.capability in ((8, 0), (9, 0), (10, 0)) else 2
    if dtype == torch.float32:
        tile = 32 if head_dim <= 64 else 16
        return Configs((), DecodeConfig(tile, warps=4, stages=stages, programs=3))
    if head_dim > 128:
        return Configs((), DecodeConfig(tile=32, warps=4, stages=stages, programs=3))
    if codes and stages > 2:
        stages = 5
    return Configs((), DecodeConfig(tile=64, warps=2, stages=stages, programs=4))


@dataclass(frozen=True)
class DecodePlan:
    """The rows of a step. Holds every tensor that a captured graph reads."""

    rows: int
    kv_len_S: Tensor  # int32
    slot_S: Tensor  # int64: the row of the table of each sequence
    table: Tensor  # int32 [S or Z + 1, W]
    block_tokens: int
    config: DecodeConfig
    items: int  # I
    partial: Tensor  # float32, the sums of shared rows
    arrived: Tensor  # int32, the finished items of shared rows; zero between launches
    # int32 [I, ITEM] by window: most models have one.
    items_by_window: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


class TritonDecode:
    """Plans and attends; owns the workspace. Steps are on one stream."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        gpu: Gpu,
        torch_device: torch.device,
        configs: Configs | None = None,
        codes: bool = False,
    ) -> None:
        """
        Args:
            configs: None: the default ones, for caches of eight bits where `codes`.
        """
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._group = heads // kv_heads
        self._head_tiles = kv_heads * triton.cdiv(self._group, TILE_HEADS)
        self._dtype = dtype
        self._gpu = gpu
        self._device = torch_device
        self._configs = configs or default_configs(dtype, head_dim, gpu, codes)
        self._constants: dict[DecodeConfig, dict[str, int | str | bool]] = {}
        # Graphs that were captured hold the older ones.
        self._workspaces = [self._workspace(ROWS)]

    def plan(
        self,
        rows: int,
        kv_len_S: Tensor,
        table: Tensor,
        block_tokens: int,
        slot_S: Tensor | None = None,
    ) -> DecodePlan:
        """Launches the balancing of rows without a window. May be captured.

        Args:
            kv_len_S: int32.
            table: int32 [S or Z + 1, W]; contiguous rows.
            slot_S: int64, the row of the table of each sequence; None: its own number.
        """
        workspace = self._workspaces[-1]
        if rows > workspace.rows:
            assert not _is_capturing(self._device), f"no workspace was made for {rows} rows"
            workspace = self._workspace(triton.next_power_of_2(rows))
            self._workspaces.append(workspace)
        config = self._configs.of(rows * self._kv_heads)
        plan = DecodePlan(
            rows,
            kv_len_S,
            workspace.slot_S if slot_S is None else slot_S,
            table,
            block_tokens,
            config,
            self._items(rows, config),
            workspace.partial,
            workspace.arrived,
        )
        self._schedule(plan, 0)
        return plan

    def replan(self, plan: DecodePlan) -> None:
        """Balances again, as the replay of a graph does, after the plan's tensors changed."""
        for window in plan.items_by_window:
            self._schedule(plan, window)

    def attend(
        self,
        q_SHE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        o_SHE: Tensor,
        plan: DecodePlan,
        *,
        window: int = 0,
        softcap: float = 0.0,
        scales: KvScales = UNIT,
    ) -> None:
        """Writes `o_SHE`, which is contiguous; one launch.

        Args:
            softcap: bounds scores to ±softcap by a hyperbolic tangent; 0: they are unbounded.
            scales: what the numbers of the caches are multiplied by.
        """
        self._launch(q_SHE, k_cache_NPKE, v_cache_NPKE, o_SHE, plan, window, softcap, scales)

    def rotate_and_attend(
        self,
        qkv_SC: Tensor,
        cos_sin_SE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        cells_S: Tensor,
        o_SHE: Tensor,
        layout: QkvLayout,
        norm: QkNorm | None,
        plan: DecodePlan,
        *,
        window: int = 0,
        scales: KvScales = UNIT,
    ) -> None:
        """Does what `RopeAndKvWrite` does and then `attend`, in one launch; leaves `qkv_SC` alone.

        Cells of the cache that hold earlier positions may not be written by this step.
        """
        assert qkv_SC.is_contiguous() and qkv_SC.shape[1] == layout.columns
        assert cos_sin_SE.is_contiguous() and cos_sin_SE.dtype == torch.float32
        assert k_cache_NPKE.is_contiguous() and v_cache_NPKE.is_contiguous()
        assert layout.head_dim % 2 == 0
        caches = k_cache_NPKE, v_cache_NPKE
        step = cos_sin_SE, cells_S
        self._launch(qkv_SC, *caches, o_SHE, plan, window, 0.0, scales, step, norm)

    def _launch(
        self,
        q: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        o_SHE: Tensor,
        plan: DecodePlan,
        window: int,
        softcap: float,
        scales: KvScales,
        step: tuple[Tensor, Tensor] | None = None,
        norm: QkNorm | None = None,
    ) -> None:
        """
        Args:
            q: q_SHE, or qkv_SC where there is a `step`.
            step: cos_sin_SE and cells_S: rotate and write, too.
        """
        items = plan.items_by_window.get(window)
        if items is None:
            self._schedule(plan, window)
            items = plan.items_by_window[window]
        rotates = step is not None
        scale = scales.k * self._head_dim**-0.5
        if softcap > 0.0:
            scale_in, scale_out = scale / softcap, softcap * math.log2(math.e)
        else:
            scale_in, scale_out = scale * math.log2(math.e), 1.0
        cos_sin_SE, cells_S = step or (plan.partial, plan.slot_S)
        _decode_kernel[(plan.items * self._head_tiles,)](
            q,
            k_cache_NPKE,
            v_cache_NPKE,
            o_SHE,
            plan.table,
            items,
            plan.partial,
            plan.arrived,
            cos_sin_SE,
            cells_S,
            q if norm is None else norm.q_E,
            q if norm is None else norm.k_E,
            q.stride(0),
            plan.table.stride(0),
            scale_in,
            scale_out,
            scales.v,
            1.0 / scales.k,
            1.0 / scales.v,
            0.0 if norm is None else norm.eps,
            BLOCK_TOKENS=plan.block_tokens,
            SOFTCAP=softcap > 0.0,
            WINDOW=window > 0,
            ROTATE=rotates,
            NORM=norm is not None,
            CODE_MAX=code_max(k_cache_NPKE.dtype) if rotates else 0.0,
            **self._constants_of(plan.config),
        )

    def _constants_of(self, config: DecodeConfig) -> dict[str, int | str | bool]:
        constants = self._constants.get(config)
        if constants is None:
            constants = self._constants[config] = self._make_constants(config)
        return constants

    def _make_constants(self, config: DecodeConfig) -> dict[str, int | str | bool]:
        group = min(triton.next_power_of_2(self._group), TILE_HEADS)
        dim = max(16, triton.next_power_of_2(self._head_dim))
        return {
            "KV_HEADS": self._kv_heads,
            "GROUP": self._group,
            "HEAD_DIM": self._head_dim,
            "HEAD_TILES": self._head_tiles,
            "TILE_HEADS": TILE_HEADS,
            "GROUP_ROWS": group,
            "DIM": dim,
            "TILE": config.tile,
            "STAGES": config.stages,
            "COMBINED": max(1, COMBINED // (group * dim)),
            "PRECISION": "ieee" if self._dtype == torch.float32 else "tf32",
            "ITEM": ITEM,
            "num_warps": config.warps,
            **self._gpu.launch,
        }

    def _items(self, rows: int, config: DecodeConfig) -> int:
        """Few rows are cut into one wave of items; many are left whole, but for the longest."""
        # Items whose programs all run at a time.
        wave = max(2, self._gpu.multiprocessors * config.programs // self._head_tiles)
        return max(wave, rows + wave // 2)

    def _schedule(self, plan: DecodePlan, window: int) -> None:
        items = plan.items_by_window.get(window)
        if items is None:
            items = torch.empty((plan.items, ITEM), dtype=torch.int32, device=self._device)
            plan.items_by_window[window] = items
        _schedule_kernel[(triton.cdiv(plan.items, ITEMS_A_PROGRAM),)](
            plan.kv_len_S,
            plan.slot_S,
            items,
            plan.rows,
            plan.items,
            window,
            plan.config.least,
            TILE=plan.config.tile,
            ROWS=next((n for n in SCHEDULED if n >= plan.rows), triton.next_power_of_2(plan.rows)),
            ITEMS=ITEMS_A_PROGRAM,
            ITEM=ITEM,
            num_warps=4,
            **self._gpu.launch,
        )

    def _workspace(self, rows: int) -> _Workspace:
        group = min(triton.next_power_of_2(self._group), TILE_HEADS)
        items = max(self._items(rows, c) for c in self._configs.all)
        numbers = items * self._head_tiles * group * (self._head_dim + 2)
        partial = torch.empty(numbers, dtype=torch.float32, device=self._device)
        arrived = torch.zeros(rows * self._head_tiles, dtype=torch.int32, device=self._device)
        return _Workspace(rows, partial, arrived, torch.arange(rows, device=self._device))


@dataclass(frozen=True)
class _Workspace:
    rows: int
    partial: Tensor
    arrived: Tensor
    slot_S: Tensor  # int64: each row's own number


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@triton.jit(
    do_not_specialize=["rows", "items", "window", "least"],
    do_not_specialize_on_alignment=["kv_len_S", "slot_S"],
)
def _schedule_kernel(
    kv_len_S,
    slot_S,
    items_I8,
    rows,
    items,
    window,
    least,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    ITEM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes ITEMS work items a program; each program repeats the balancing.

    An item: row of queries, row of the table, positions the sequence has, first tile, tile after
    the last, first item of the row, items of the row, first position the row sees. Items that
    are not needed have no tiles. Items of shared rows come first.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.arange(0, ROWS)
    kv_len = tl.load(kv_len_S + row, mask=row < rows, other=0)
    seen = tl.where(window > 0, tl.maximum(kv_len - window, 0), 0)
    tiles = tl.cdiv(kv_len, TILE) - seen // TILE

    # The least number of tiles an item may have for all items to fit: between the mean, and what
    # makes every row one item.
    low = tl.maximum(tl.cdiv(tl.sum(tiles, 0), items), least)
    high = tl.maximum(tl.max(tiles, 0), low)
    while low < high:
        middle = (low + high) // 2
        fits = tl.sum(tl.cdiv(tiles, middle), 0) <= items
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    count = tl.cdiv(tiles, low)
    count_shared = tl.where(count > 1, count, 0)
    count_whole = tl.where(count == 1, 1, 0)
    shared = tl.sum(count_shared, 0)
    used = shared + tl.sum(count_whole, 0)
    end_shared = tl.cumsum(count_shared, 0)
    end_whole = shared + tl.cumsum(count_whole, 0)

    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    is_shared = item < shared
    is_used = item < used
    end = tl.where(is_shared[:, None], end_shared[None, :], end_whole[None, :])
    is_before = end <= item[:, None]
    mine = tl.sum(is_before.to(tl.int32), 1)
    mine = tl.where(is_used, mine, 0)
    base = tl.max(tl.where(is_before, end, 0), 1)
    my_len = tl.load(kv_len_S + mine, mask=is_used, other=0)
    my_table = tl.load(slot_S + mine, mask=is_used, other=0)
    my_seen = tl.where(window > 0, tl.maximum(my_len - window, 0), 0)
    my_first = my_seen // TILE
    my_tiles = tl.cdiv(my_len, TILE) - my_first
    my_count = tl.where(is_shared, tl.cdiv(my_tiles, low), 1)
    part = tl.where(is_shared, item - base, 0)
    tile_first = my_first + part * my_tiles // my_count
    tile_end = my_first + (part + 1) * my_tiles // my_count
    is_item = item < items
    out = items_I8 + item * ITEM
    tl.store(out, mine, mask=is_item)
    tl.store(out + 1, my_table.to(tl.int32), mask=is_item)
    tl.store(out + 2, my_len, mask=is_item)
    tl.store(out + 3, tile_first, mask=is_item)
    tl.store(out + 4, tl.where(is_used, tile_end, tile_first), mask=is_item)
    tl.store(out + 5, item - part, mask=is_item)
    tl.store(out + 6, my_count, mask=is_item)
    tl.store(out + 7, my_seen, mask=is_item)


@triton.jit
def _load_pairs(x, heads_at, dim, other, mask):
    """Returns each number of some heads and the other one of its pair, in float32.

    Args:
        heads_at: where each head begins, [heads, 1].
        dim, other: where in a head the number and the other one are, [DIM].
    """
    x_own = tl.load(x + heads_at + dim[None, :], mask=mask, other=0.0)
    x_other = tl.load(x + heads_at + other[None, :], mask=mask, other=0.0)
    return x_own.to(tl.float32), x_other.to(tl.float32)


@triton.jit
def _rotated(
    x_own, x_other, weight_E, eps, cos, sin, dim, other, is_dim,
    HEAD_DIM: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Normalises and rotates what `_load_pairs` returns.

    Args:
        cos, sin: of each number, [DIM]; the sine is negated in a head's lower half.
    """
    if NORM:
        own_weight = tl.load(weight_E + dim, mask=is_dim, other=0.0).to(tl.float32)
        other_weight = tl.load(weight_E + other, mask=is_dim, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x_own * x_own, 1) / HEAD_DIM + eps)[:, None]
        x_own = x_own * scale * own_weight[None, :]
        x_other = x_other * scale * other_weight[None, :]
    # Which product is rounded before the sum is said here and in `ops/rope/triton.py`: a compiler
    # would choose by the order of the text, and one number of some thousands would round otherwise.
    return tl.fma(x_own, cos[None, :], x_other * sin[None, :])


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table_ZW", "cells_S"],
)
def _decode_kernel(  # noqa: PLR0912, PLR0915
    q_SHE,  # with ROTATE qkv_SC
    k_cache_NPKE,
    v_cache_NPKE,
    o_SHE,
    table_ZW,
    items_I8,
    partial,
    arrived,
    cos_sin_SE,  # unused unless ROTATE, as are the next ones
    cells_S,
    q_weight_E,  # unused unless NORM
    k_weight_E,  # unused unless NORM
    q_stride,
    table_stride,
    scale_in,
    scale_out,
    v_scale,
    k_inverse,  # of the scales; unused unless CODE_MAX
    v_inverse,
    eps,
    BLOCK_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
    CODE_MAX: tl.constexpr,  # with ROTATE, of caches that keep codes, else 0
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILES: tl.constexpr,  # of all kv heads
    TILE_HEADS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,  # rows of a head tile that are kept in the workspace
    DIM: tl.constexpr,  # HEAD_DIM, padded to a power of two
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    COMBINED: tl.constexpr,  # parts of a shared row that are added up at a time
    PRECISION: tl.constexpr,
    ITEM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attends to the tiles of one item with one tile of heads; heads of an item are neighbours."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    item = tl.program_id(0) // HEAD_TILES
    head_tile = tl.program_id(0) % HEAD_TILES
    fields = items_I8 + item * ITEM
    tile_first = tl.load(fields + 3)
    tile_end = tl.load(fields + 4)
    row = tl.load(fields).to(tl.int64)
    slot = tl.load(fields + 1).to(tl.int64)
    kv_len = tl.load(fields + 2)
    base = tl.load(fields + 5)
    count = tl.load(fields + 6)
    seen = tl.load(fields + 7)
    if tile_first == tile_end:
        return
    table_row = table_ZW + slot * table_stride

    tiles_a_group: tl.constexpr = HEAD_TILES // KV_HEADS
    kv_head = head_tile // tiles_a_group
    dim = tl.arange(0, DIM)
    is_dim = dim < HEAD_DIM
    head = (head_tile % tiles_a_group) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    is_head = head < GROUP
    head_mask = is_head[:, None]
    if DIM != HEAD_DIM:
        head_mask = head_mask & is_dim[None, :]
    at = (kv_head * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
    if ROTATE:
        half: tl.constexpr = HEAD_DIM // 2
        is_low = dim < half
        other = tl.where(is_low, dim + half, dim - half)
        cos_sin_E = cos_sin_SE + row * HEAD_DIM
        cos = tl.load(cos_sin_E + dim % half, mask=is_dim, other=0.0)
        sin = tl.load(cos_sin_E + half + dim % half, mask=is_dim, other=0.0)
        sin = tl.where(is_low, -sin, sin)
        # Programs that will not write have these loads, too: they are in nobody's way.
        new_mask = is_dim[None, :]
        qkv_C = q_SHE + row * q_stride
        k_at = (KV_HEADS * GROUP + kv_head + tl.zeros([1], tl.int32))[:, None] * HEAD_DIM
        k_own, k_other = _load_pairs(qkv_C, k_at, dim, other, new_mask)
        v_at = k_at + KV_HEADS * HEAD_DIM + dim[None, :]
        v_new = tl.load(qkv_C + v_at, mask=new_mask, other=0.0)
        q_at = (kv_head * GROUP + head)[:, None] * HEAD_DIM
        q_own, q_other = _load_pairs(qkv_C, q_at, dim, other, head_mask)
        if tile_end == tl.cdiv(kv_len, TILE):
            k_new = _rotated(
                k_own, k_other, k_weight_E, eps, cos, sin, dim, other, is_dim, HEAD_DIM, NORM
            )
            k_new = saturated(k_new, k_inverse, CODE_MAX=CODE_MAX)
            v_code = saturated(v_new, v_inverse, CODE_MAX=CODE_MAX)
            cell_new = tl.load(cells_S + row)
            number_new = (cell_new * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
            # Programs of a group with more heads than a tile write the same.
            tl.store(
                k_cache_NPKE + number_new, k_new.to(k_cache_NPKE.dtype.element_ty), mask=new_mask
            )
            tl.store(
                v_cache_NPKE + number_new, v_code.to(v_cache_NPKE.dtype.element_ty), mask=new_mask
            )
            # It is read below, by other threads.
            tl.debug_barrier()
        q = _rotated(
            q_own, q_other, q_weight_E, eps, cos, sin, dim, other, is_dim, HEAD_DIM, NORM
        ).to(q_SHE.dtype.element_ty)
    else:
        q = tl.load(q_SHE + row * q_stride + at, mask=head_mask, other=0.0)

    if k_cache_NPKE.dtype.element_ty.is_fp8() and q.dtype != tl.float32:
        q = saturated(q, scale_in, CODE_MAX=FLOAT16_MAX).to(tl.float16)
        scale_in = 1.0

    top = tl.full([TILE_HEADS], -float("inf"), tl.float32)
    total = tl.zeros([TILE_HEADS], tl.float32)
    sums = tl.zeros([TILE_HEADS, DIM], tl.float32)
    for tile in tl.range(tile_first, tile_end, num_stages=STAGES):
        position = tile * TILE + tl.arange(0, TILE)
        is_seen = position < kv_len
        if WINDOW:
            is_seen = is_seen & (position >= seen)
        block = tl.load(table_row + position // BLOCK_TOKENS, mask=is_seen, other=0)
        # Pools hold more than 2^31 numbers.
        cell = block.to(tl.int64) * BLOCK_TOKENS + position % BLOCK_TOKENS
        number = (cell * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
        # What is not seen may hold anything, and NaN times a weight of zero were NaN.
        cell_mask = is_seen[:, None]
        if DIM != HEAD_DIM:
            cell_mask = cell_mask & is_dim[None, :]
        k = tl.load(k_cache_NPKE + number, mask=cell_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale_in
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1)
            scores = (1.0 - 2.0 / (tl.exp2(scores * 2.885390081777927) + 1.0)) * scale_out
        scores = tl.where(is_seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        v = tl.load(v_cache_NPKE + number, mask=cell_mask, other=0.0).to(q.dtype)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None]
        sums = tl.dot(weights.to(q.dtype), v, sums, input_precision=PRECISION)
        top = new_top

    out = o_SHE + row * (KV_HEADS * GROUP * HEAD_DIM)
    if count == 1:
        result = sums * (v_scale / total)[:, None]
        tl.store(out + at, result.to(o_SHE.dtype.element_ty), mask=head_mask)
    else:
        # Sums of all parts, then their tops and totals.
        parts = tl.num_programs(0) * GROUP_ROWS
        mine = tl.program_id(0) * GROUP_ROWS + tl.arange(0, TILE_HEADS)
        tl.store(partial + mine[:, None] * HEAD_DIM + dim[None, :], sums, mask=head_mask)
        tops = partial + parts * HEAD_DIM
        tl.store(tops + mine, top, mask=is_head)
        tl.store(tops + parts + mine, total, mask=is_head)
        # The barrier puts all threads' stores before the release of the one that counts.
        tl.debug_barrier()
        counter = arrived + row * HEAD_TILES + head_tile
        before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if before == count - 1:
            tl.store(counter, 0)  # All have arrived; the next launch counts anew.
            _combine(
                out, partial, tops, tops + parts, base, count, head_tile, v_scale,
                KV_HEADS, GROUP, HEAD_DIM, HEAD_TILES, TILE_HEADS, GROUP_ROWS, DIM, COMBINED,
            )  # fmt: skip


@triton.jit
def _combine(
    out,
    partial,
    tops,
    totals,
    base,
    count,
    head_tile,
    v_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COMBINED: tl.constexpr,
):
    """Adds up the parts of a shared row. Reads past the first-level cache, where none is stale."""
    tiles_a_group: tl.constexpr = HEAD_TILES // KV_HEADS
    dim = tl.arange(0, DIM)
    head = tl.arange(0, GROUP_ROWS)
    in_group = (head_tile % tiles_a_group) * TILE_HEADS + head
    top = tl.full([GROUP_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    sums = tl.zeros([GROUP_ROWS, DIM], tl.float32)
    for first in tl.range(0, count, COMBINED):
        part = first + tl.arange(0, COMBINED)
        mine = ((base + part) * HEAD_TILES + head_tile)[:, None] * GROUP_ROWS + head[None, :]
        is_part = (part < count)[:, None] & (in_group < GROUP)[None, :]
        part_top = tl.load(tops + mine, mask=is_part, other=-float("inf"), cache_modifier=".cg")
        part_total = tl.load(totals + mine, mask=is_part, other=0.0, cache_modifier=".cg")
        part_sums = tl.load(
            partial + mine[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=is_part[:, :, None] & (dim < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(part_top, 0))
        # Rows that pad the group have no top.
        new_top = tl.where(in_group < GROUP, new_top, 0.0)
        weights = tl.exp2(part_top - new_top[None, :])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(part_total * weights, 0)
        sums = sums * fade[:, None] + tl.sum(part_sums * weights[:, :, None], 0)
        top = new_top
    kv_head = head_tile // tiles_a_group
    at = (kv_head * GROUP + in_group)[:, None] * HEAD_DIM + dim[None, :]
    result = sums * (v_scale / total)[:, None]
    mask = (in_group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)
