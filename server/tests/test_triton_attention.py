"""Paged attention's Triton kernels against the reference, in pools whose other cells are NaN.

Without a CUDA device they run in Triton's interpreter, on small shapes; its matrix product does
not know bfloat16.
"""

# T tokens · S rows · H query heads · K kv heads · E head dim · N blocks · P tokens per block
# B blocks per table row · Z slots · W table width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.device.base import Device
from headrace.ops.base import No, OpSpec
from headrace.ops.kv_write.base import CODES, UNIT, KvScales, encode
from headrace.ops.matmul.cuda import CudaMatmul
from headrace.ops.paged_attention import CANDIDATES, DecodeShape, StepShape, cuda
from headrace.ops.paged_attention import fa3 as fa3_module
from headrace.ops.paged_attention.cuda import Cuda, CudaAttention
from headrace.ops.paged_attention.reference import ReferenceAttention
from headrace.ops.rope.base import QkNorm, QkvLayout
from headrace.ops.triton import INTERPRETED, Gpu

pytest.importorskip("triton")

import triton
import triton.language as tl
from device_here import DEVICE, device_gpu
from triton.language.extra.cuda import gdc_launch_dependents

from headrace.ops.paged_attention.triton_decode import Configs, DecodeConfig, TritonDecode
from headrace.ops.paged_attention.triton_prefill import PrefillConfig, TritonPrefill
from headrace.ops.rope.triton import triton_rope_and_kv_write

# Relative to the largest value: float32 sums in another order; the others round the softmax, too.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# More programs than the interpreter's device has make many splits of short rows.
SMALL = DecodeConfig(tile=16, warps=2, stages=2, programs=6)
FINE = DecodeConfig(tile=16, warps=4, stages=3, programs=60)
COARSE = DecodeConfig(tile=64, warps=2, stages=3, programs=1)
PREFILL = PrefillConfig(queries=16, tile=32, warps=4, stages=2)


def gpu_here() -> Gpu:
    # So few multiprocessors that the tests' configurations mean the same everywhere.
    return replace(device_gpu(), multiprocessors=INTERPRETED.multiprocessors)


@dataclass(frozen=True)
class Heads:
    """Counts and the dim of heads."""

    q: int  # H
    kv: int  # K
    dim: int  # E


@dataclass(frozen=True)
class Case:
    """A pool with the contexts of some rows, and their queries."""

    q_THE: Tensor
    k_cache_NPKE: Tensor
    v_cache_NPKE: Tensor
    shape: StepShape

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        return self.k_cache_NPKE, self.v_cache_NPKE

    def fresh(self) -> tuple[Tensor, Tensor]:
        """The keys and values of the step's own tokens, as strided rows."""
        both: list[Tensor] = []
        for cache in self.caches:
            cells_T = torch.cat(
                [
                    cells(self.shape.table_SB[row], int(start + length), self.shape.block_tokens)[
                        int(start) :
                    ]
                    for row, (start, length) in enumerate(
                        zip(self.shape.row_start_S, self.shape.row_len_S, strict=True)
                    )
                ]
            )
            values = cache.flatten(0, 1)[cells_T]
            both.append(torch.cat((values, torch.full_like(values, torch.nan)), 1))
        kv_heads = self.k_cache_NPKE.shape[2]
        return both[0][:, :kv_heads], both[1][:, :kv_heads]


def cells(table_B: Tensor, context: int, block: int) -> Tensor:
    """The cells of a sequence's positions."""
    blocks = table_B[: -(-context // block)].long()
    offset = torch.arange(block, device=table_B.device)
    return (blocks[:, None] * block + offset).flatten()[:context]


def make(rows: list[tuple[int, int]], heads: Heads, block: int, dtype: torch.dtype) -> Case:
    """Scatters the blocks of rows (tokens before the step, of the step) over a pool of NaN.

    Decode rows come first. The tables' unused entries name block 0.
    """
    random = torch.Generator(DEVICE).manual_seed(len(rows) + heads.q + heads.dim + block)
    starts = np.array([start for start, _ in rows], dtype=np.int32)
    lengths = np.array([length for _, length in rows], dtype=np.int32)
    contexts = starts + lengths
    counts = -(-contexts // block)
    blocks = int(counts.sum()) + 3
    order = torch.randperm(blocks - 1, generator=random, device=DEVICE) + 1
    table_SB = torch.zeros((len(rows), int(counts.max()) + 1), dtype=torch.int32, device=DEVICE)
    pool = (blocks, block, heads.kv, heads.dim)
    caches = [torch.full(pool, torch.nan, device=DEVICE) for _ in range(2)]
    at = 0
    for row, count in enumerate(counts.tolist()):
        table_SB[row, :count] = order[at : at + count].int()
        at += count
        mine = cells(table_SB[row], int(contexts[row]), block)
        for cache in caches:
            written = (len(mine), heads.kv, heads.dim)
            values = torch.randn(written, generator=random, device=DEVICE)
            cache.view(-1, heads.kv, heads.dim)[mine] = values
    # Rows of queries are strided, as they are when they are a view of the fused projection.
    tokens = int(lengths.sum())
    qkv = torch.randn((tokens, heads.q + 2, heads.dim), generator=random, device=DEVICE)
    first_S1 = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    shape = StepShape(
        starts,
        lengths,
        table_SB,
        block,
        kv_len_S=torch.from_numpy(contexts).to(DEVICE),
        first_S1=torch.from_numpy(first_S1).to(DEVICE),
        decode_rows=next((i for i, n in enumerate(lengths) if n != 1), len(rows)),
    )
    qkv, k_cache, v_cache = (tensor.to(dtype) for tensor in (qkv, *caches))
    return Case(qkv[:, : heads.q], k_cache, v_cache, shape)


def backend(
    heads: Heads,
    dtype: torch.dtype,
    config: DecodeConfig | None = SMALL,
    prefill: PrefillConfig | None = PREFILL,
    fa3: bool = False,
) -> CudaAttention:
    shape = heads.q, heads.kv, heads.dim
    gpu = gpu_here()
    configs = None if config is None else Configs((), config)
    decode = TritonDecode(*shape, dtype, gpu, DEVICE, configs)
    if fa3:
        return CudaAttention(decode, fa3_module.Fa3Prefill(heads.dim))
    return CudaAttention(decode, TritonPrefill(*shape, dtype, gpu, prefill))


def expect(case: Case, window: int = 0, softcap: float = 0.0) -> Tensor:
    """The reference's answer in float32; the cap is the reference's scores bent by hand."""
    oracle = ReferenceAttention()
    wide = [tensor.float() for tensor in (case.q_THE, *case.caches)]
    return oracle.attend(*wide, case.shape, window, softcap=softcap)


def compare(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.is_contiguous()
    assert actual.dtype == dtype
    assert expected.isfinite().all()
    bound = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=bound)


def check(
    case: Case, made: CudaAttention, window: int = 0, softcap: float = 0.0, fresh: bool = False
) -> None:
    dtype = case.q_THE.dtype
    before = case.q_THE.clone()
    plan = made.plan(case.shape)
    mine = case.fresh() if fresh else None
    expected = expect(case, window, softcap)
    for _ in range(2):  # What counts arrivals must be ready for the next layer.
        actual = made.attend(case.q_THE, *case.caches, plan, window, mine, softcap=softcap)
        compare(actual, expected, dtype)
    assert torch.equal(case.q_THE, before), "queries must be left alone"


def decode_rows(lengths: list[int]) -> list[tuple[int, int]]:
    return [(length - 1, 1) for length in lengths]


LENGTHS = {
    "one token": [1],
    "a tile's and a block's ends": [15, 16, 17, 31, 32, 33, 63, 64, 65],
    "one long row": [300],
    "one long among short": [5, 3, 260, 1, 9],
    "all alike": [48] * 5,
    "more rows than a wave": [17] * 20,
}


@pytest.mark.parametrize("config", [SMALL, FINE, COARSE], ids=["small", "fine", "coarse"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_decode_rows_of_all_lengths(lengths: str, config: DecodeConfig) -> None:
    heads = Heads(4, 2, 16)
    case = make(decode_rows(LENGTHS[lengths]), heads, 16, torch.float32)
    check(case, backend(heads, torch.float32, config))


@pytest.mark.parametrize(
    ("block", "dtype"),
    [(1, torch.float32), (16, torch.float16), (64, torch.float32), (64, torch.float16)],
)
@pytest.mark.parametrize(
    "heads",
    [Heads(2, 2, 32), Heads(4, 2, 64), Heads(9, 3, 16), Heads(4, 1, 48), Heads(16, 2, 16)],
    ids=str,
)
def test_decode_rows_of_all_shapes(heads: Heads, block: int, dtype: torch.dtype) -> None:
    case = make(decode_rows([1, 70, 33]), heads, block, dtype)
    check(case, backend(heads, dtype))


def test_a_group_of_more_heads_than_a_tile() -> None:
    heads = Heads(40, 2, 16)
    case = make(decode_rows([1, 70, 33]), heads, 16, torch.float32)
    check(case, backend(heads, torch.float32, FINE))


@pytest.mark.parametrize("window", [1, 5, 16, 40])
def test_decode_rows_that_see_a_window(window: int) -> None:
    heads = Heads(4, 2, 16)
    case = make(decode_rows([1, 70, 33, 16, 200]), heads, 16, torch.float32)
    check(case, backend(heads, torch.float32), window)


def test_a_plan_serves_layers_with_and_without_a_window() -> None:
    heads = Heads(4, 2, 16)
    case = make([*decode_rows([20, 70]), (3, 20)], heads, 16, torch.float32)
    made = backend(heads, torch.float32)
    plan = made.plan(case.shape)
    for window in (9, 0, 9):
        actual = made.attend(case.q_THE, *case.caches, plan, window)
        compare(actual, expect(case, window), torch.float32)


@pytest.mark.parametrize("rows", [decode_rows([1, 70, 33]), [(3, 20), (0, 5)]], ids=str)
def test_scores_are_bounded_softly(rows: list[tuple[int, int]]) -> None:
    heads = Heads(4, 2, 16)
    case = make(rows, heads, 16, torch.float32)
    check(case, backend(heads, torch.float32), softcap=0.7)


KV_SCALES = KvScales(0.5, 4.0)
stored_in = pytest.mark.parametrize("stored", CODES, ids=str)


def skip_without(stored: torch.dtype) -> None:
    if DEVICE.type == "cuda" and stored == torch.float8_e4m3fn and gpu_here().capability < (8, 9):
        pytest.skip("the device has no float8_e4m3fn")


@stored_in
@pytest.mark.parametrize(
    "dtype",
    # The interpreter makes no bfloat16 of 8 bits.
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
@pytest.mark.parametrize("rows", [[(0, 1), (39, 1)], [(20, 1), (0, 12), (9, 6)]], ids=str)
def test_caches_of_codes_with_scales(
    rows: list[tuple[int, int]], dtype: torch.dtype, stored: torch.dtype
) -> None:
    skip_without(stored)
    heads = Heads(4, 2, 16)
    case, wide = coded(make(rows, heads, 16, dtype), stored)
    made = backend(heads, dtype)
    for window in (0, 7):
        actual = made.attend(
            case.q_THE, *case.caches, made.plan(case.shape), window, None, KV_SCALES
        )
        compare(actual, expect(wide, window), dtype)


def coded(case: Case, stored: torch.dtype) -> tuple[Case, Case]:
    """The case with caches of codes, and with the numbers that these stand for."""
    scales = KV_SCALES.k, KV_SCALES.v
    codes = [encode(c, stored, scale) for c, scale in zip(case.caches, scales, strict=True)]
    numbers = [code.float() * scale for code, scale in zip(codes, scales, strict=True)]
    of_codes = replace(case, k_cache_NPKE=codes[0], v_cache_NPKE=codes[1])
    return of_codes, replace(case, k_cache_NPKE=numbers[0], v_cache_NPKE=numbers[1])


def test_a_bad_query_is_a_bad_output_with_codes_too() -> None:
    heads = Heads(4, 2, 16)
    case, _ = coded(make(decode_rows([40, 40]), heads, 16, torch.float16), torch.float8_e5m2)
    case.q_THE[0, 1, 3] = torch.nan
    case.q_THE[1, 2, 5] = 60000.0
    made = backend(heads, torch.float16)
    o_THE = made.attend(case.q_THE, *case.caches, made.plan(case.shape), 0, None, KV_SCALES)
    assert o_THE[0, 1].isnan().all() and o_THE[0, [0, 2, 3]].isfinite().all()
    assert o_THE[1].isfinite().all()


@stored_in
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.float32,
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_rotation_and_write_of_codes_are_in_the_launch(
    dtype: torch.dtype, stored: torch.dtype, norm: bool
) -> None:
    skip_without(stored)
    heads = Heads(4, 2, 16)
    step = fused([1, 34, 17], heads, 16, dtype, norm)
    step = replace(step, case=coded(step.case, stored)[0], scales=KV_SCALES)
    made = backend(heads, dtype)
    ours, theirs = step.twins(made, 0)
    compare(ours[0], theirs[0].float(), dtype)
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        # A sum of squares in another order may be another code where two are as near.
        same = our.view(torch.uint8) == their.view(torch.uint8)
        assert same.float().mean() == 1.0 if not norm else same.float().mean() > 0.99


STEPS = {
    "one prompt": [(0, 33)],
    "later chunk": [(19, 30)],
    "ragged prompts": [(0, 5), (0, 64), (7, 2), (31, 33), (0, 16)],
    "mixed": [(50, 1), (3, 1), (120, 1), (0, 20), (9, 12), (4, 1)],
}


@pytest.mark.parametrize("window", [0, 7, 40])
@pytest.mark.parametrize("rows", STEPS)
def test_rows_of_many_tokens(rows: str, window: int) -> None:
    heads = Heads(4, 2, 16)
    check(make(STEPS[rows], heads, 16, torch.float32), backend(heads, torch.float32), window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block", [1, 64])
@pytest.mark.parametrize("heads", [Heads(2, 2, 32), Heads(9, 3, 48), Heads(8, 1, 64)], ids=str)
def test_rows_of_many_tokens_of_all_shapes(heads: Heads, block: int, dtype: torch.dtype) -> None:
    check(make(STEPS["mixed"], heads, block, dtype), backend(heads, dtype))


@dataclass(frozen=True)
class Fused:
    """A decode step before its queries and keys are rotated, its newest cells NaN."""

    case: Case
    shape: DecodeShape
    qkv_SC: Tensor
    cos_sin_SE: Tensor
    cells_S: Tensor
    layout: QkvLayout
    norm: QkNorm | None
    scales: KvScales = UNIT

    def twins(self, made: CudaAttention, window: int) -> tuple[list[Tensor], list[Tensor]]:
        """Output and caches of the fused launch, and of the two that it stands for."""
        ours = [cache.clone() for cache in self.case.caches]
        theirs = [cache.clone() for cache in self.case.caches]
        plan = made.plan_decode(self.shape)
        outputs: list[Tensor] = []
        before = self.qkv_SC.clone()
        for _ in range(2):  # What counts arrivals must be ready for the next layer.
            for cache, other in zip(ours, self.case.caches, strict=True):
                cache.copy_(other)
            o_SHE = made.rotate_and_attend(
                self.qkv_SC, self.cos_sin_SE, ours[0], ours[1], self.cells_S, self.layout,
                self.norm, plan, window, self.scales,
            )  # fmt: skip
            outputs.append(o_SHE)
        assert torch.equal(self.qkv_SC, before), "the projection must be left alone"
        # Rows of padding share a cell, here with different tokens: which one they see is chance.
        rows = len(self.case.shape.row_len_S)
        torch.testing.assert_close(outputs[0][:rows], outputs[1][:rows], rtol=0, atol=0)
        q_SHE = triton_rope_and_kv_write(gpu_here())(
            before, self.cos_sin_SE, theirs[0], theirs[1], self.cells_S, self.layout, self.norm,
            self.scales,
        )  # fmt: skip
        expected = made.attend(q_SHE, theirs[0], theirs[1], plan, window, None, self.scales)
        return [outputs[0], *ours], [expected, *theirs]


def fused(
    lengths: list[int], heads: Heads, block: int, dtype: torch.dtype, norm: bool, padding: int = 0
) -> Fused:
    """A step of rows with so many positions each, then rows of padding."""
    case = make(decode_rows(lengths), heads, block, dtype)
    random = torch.Generator(DEVICE).manual_seed(5)
    rows, layout = len(lengths) + padding, QkvLayout(heads.q, heads.kv, heads.dim)
    cells_S = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    for row, length in enumerate(lengths):
        cells_S[row] = cells(case.shape.table_SB[row], length, block)[-1]
    for cache in case.caches:
        cache.flatten(0, 1)[cells_S] = torch.nan
    table_ZW = torch.zeros((rows + 2, case.shape.table_SB.shape[1]), dtype=torch.int32)
    table_ZW = table_ZW.to(DEVICE)
    slot_S = torch.full((rows,), rows + 1, device=DEVICE)
    slot_S[: len(lengths)] = torch.arange(len(lengths), 0, -1, device=DEVICE)
    table_ZW[slot_S[: len(lengths)]] = case.shape.table_SB
    kv_len_S = torch.ones(rows, dtype=torch.int32, device=DEVICE)
    kv_len_S[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    angles = torch.rand((rows, heads.dim // 2), generator=random, device=DEVICE) * 6
    qkv_SC = torch.randn((rows, layout.columns), generator=random, device=DEVICE).to(dtype)
    weights = None
    if norm:
        q_E, k_E = torch.rand((2, heads.dim), generator=random, device=DEVICE).to(dtype) + 0.5
        weights = QkNorm(q_E, k_E, 1e-5)
    shape = DecodeShape(rows, slot_S, kv_len_S, table_ZW, block)
    cos_sin_SE = torch.cat((angles.cos(), angles.sin()), 1)
    return Fused(case, shape, qkv_SC, cos_sin_SE, cells_S, layout, weights)


def check_fused(step: Fused, made: CudaAttention, window: int = 0) -> None:
    ours, theirs = step.twins(made, window)
    dtype, rows = step.qkv_SC.dtype, len(step.case.shape.row_len_S)
    compare(ours[0][:rows], theirs[0][:rows].float(), dtype)
    assert ours[0].isfinite().all(), "padding rows must not make NaN"
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        written = our.flatten(0, 1)[step.cells_S[:rows]]
        expected = their.flatten(0, 1)[step.cells_S[:rows]]
        # The bits are the same, but the sum of a norm's squares may be of another order.
        bound = TOLERANCE[dtype] if step.norm is not None else 0.0
        torch.testing.assert_close(written, expected, rtol=bound, atol=bound)
        # Nothing else is written, but for the cell of padding.
        for cache in (our, their):
            cache.flatten(0, 1)[step.cells_S] = 0.0
        torch.testing.assert_close(our, their, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("config", [SMALL, FINE, COARSE], ids=["small", "fine", "coarse"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_rotation_and_write_are_in_the_launch(lengths: str, config: DecodeConfig) -> None:
    heads = Heads(4, 2, 16)
    step = fused(LENGTHS[lengths], heads, 16, torch.float32, norm=False, padding=2)
    check_fused(step, backend(heads, torch.float32, config))


@pytest.mark.parametrize(
    ("dtype", "norm"),
    [(torch.float32, True), (torch.float16, False), (torch.float16, True)],
    ids=["float32, norm", "float16", "float16, norm"],
)
@pytest.mark.parametrize(
    ("heads", "block"), [(Heads(9, 3, 16), 1), (Heads(4, 1, 48), 16), (Heads(40, 2, 16), 64)]
)
def test_rotation_and_write_of_all_shapes(
    heads: Heads, block: int, dtype: torch.dtype, norm: bool
) -> None:
    check_fused(fused([1, 70, 33, 65], heads, block, dtype, norm), backend(heads, dtype))


@pytest.mark.parametrize("window", [1, 5, 16, 40])
def test_rotation_and_write_with_a_window(window: int) -> None:
    heads = Heads(4, 2, 16)
    step = fused([1, 70, 33, 16, 200], heads, 16, torch.float32, norm=False)
    check_fused(step, backend(heads, torch.float32), window)


def test_only_captured_steps_of_few_rows_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(4, 2, 16)
    made = backend(heads, torch.float32)
    monkeypatch.setattr(cuda, "ROTATED_ROWS_MAX", 3)
    for rows, rotates in ((3, True), (4, False)):
        step = fused([5] * rows, heads, 16, torch.float32, norm=False)
        assert made.rotates(made.plan_decode(step.shape)) == rotates
    assert not made.rotates(made.plan(make(decode_rows([5]), heads, 16, torch.float32).shape))
    assert not ReferenceAttention().rotates(None)


def test_items_are_as_long_as_is_asked() -> None:
    made = backend(Heads(4, 2, 16), torch.float32, replace(FINE, least=3))
    case = make(decode_rows([1, 160, 100]), Heads(4, 2, 16), 16, torch.float32)
    check(case, made)
    plan = made.plan(case.shape)
    assert plan.decode is not None
    items = plan.decode.items_by_window[0]
    tiles = [count for count in (items[:, 4] - items[:, 3]).tolist() if count]
    assert sorted(tiles) == [1, 2, 2, 2, 2, 3, 3, 3]


def graph_case(made_for: Heads, dtype: torch.dtype) -> tuple[Case, DecodeShape, Tensor]:
    """A captured step over 6 rows of which 4 are used at first; queries as [rows, H, E]."""
    case = make(decode_rows([1, 70, 33, 100, 9, 257]), made_for, 16, dtype)
    table_SB = case.shape.table_SB
    table_ZW = torch.zeros((9, table_SB.shape[1]), dtype=torch.int32, device=DEVICE)
    shape = DecodeShape(
        rows=6,
        slot_S=torch.full((6,), 8, device=DEVICE),
        kv_len_S=torch.ones(6, dtype=torch.int32, device=DEVICE),
        table_ZW=table_ZW,
        block_tokens=16,
    )
    # The padding's one position is in block 0, whose first cell is written with anything finite.
    for cache in case.caches:
        cache[0, 0] = 1.0
    return case, shape, table_SB


def fill(shape: DecodeShape, case: Case, rows: list[int], slots: list[int]) -> None:
    """Binds rows of the case to slots, as the kernel that makes a step's inputs does."""
    count = len(rows)
    assert case.shape.kv_len_S is not None
    shape.slot_S.fill_(8)
    shape.slot_S[:count] = torch.tensor(slots, device=DEVICE)
    shape.kv_len_S.fill_(1)
    shape.kv_len_S[:count] = case.shape.kv_len_S[rows]
    shape.table_ZW[slots] = case.shape.table_SB[rows]


def replays(
    heads: Heads, dtype: torch.dtype, run: Callable[[CudaAttention, DecodeShape, Tensor], Replay]
) -> None:
    case, shape, _ = graph_case(heads, dtype)
    made = backend(heads, dtype, FINE)
    q_SHE = torch.zeros_like(case.q_THE.contiguous())
    expected = expect(case)
    replay = None
    for rows, slots in (([0, 1, 2, 3], [3, 0, 5, 7]), ([5], [2]), ([4, 5, 3, 2, 1, 0], range(6))):
        fill(shape, case, rows, list(slots))
        q_SHE[: len(rows)] = case.q_THE[rows]
        if replay is None:
            replay = run(made, shape, q_SHE)
        actual = replay(case)
        compare(actual[: len(rows)].contiguous(), expected[rows], dtype)
        assert actual.isfinite().all(), "padding rows must not make NaN"


Replay = Callable[[Case], Tensor]


def test_a_step_planned_once_serves_other_rows() -> None:
    def run(made: CudaAttention, shape: DecodeShape, q_SHE: Tensor) -> Replay:
        plan = made.plan_decode(shape)

        def replay(case: Case) -> Tensor:
            made.replan(plan)
            return made.attend(q_SHE, *case.caches, plan)

        return replay

    replays(Heads(4, 2, 16), torch.float32, run)


@pytest.mark.parametrize("rows", [1, 5, 31, 64])
def test_work_is_balanced(rows: int) -> None:
    """All tiles are in exactly one item, and no item is longer than it has to be."""
    made = TritonDecode(32, 8, 16, torch.float32, replace(gpu_here(), multiprocessors=132), DEVICE)
    random = np.random.default_rng(rows)
    for longest in (1, 600, 9000):
        lengths = random.integers(1, longest + 1, rows).astype(np.int32)
        kv_len_S = torch.from_numpy(lengths).to(DEVICE)
        table = torch.zeros((rows, 1), dtype=torch.int32, device=DEVICE)
        plan = made.plan(rows, kv_len_S, table, 16)
        items = plan.items_by_window[0].cpu().numpy()
        tile = 32  # what the default is for float32
        tiles = -(-lengths // tile)
        seen = [np.zeros(count, dtype=np.int64) for count in tiles]
        for row, table_row, length, first, end, base, count, _ in items:
            if first == end:
                continue
            assert row == table_row
            assert length == lengths[row]
            seen[row][first:end] += 1
            assert count == sum(1 for item in items if item[0] == row and item[3] < item[4])
            assert items[base][0] == row and items[base][3] == 0
        assert all((row == 1).all() for row in seen)
        most = int((items[:, 4] - items[:, 3]).max())
        assert most == 1 or sum(-(-tiles // (most - 1))) > plan.items


def test_the_cpu_refuses() -> None:
    class Cpu:
        kind = "cpu"

    device: Device = Cpu()  # type: ignore[assignment]
    spec = OpSpec(4, 2, 16, torch.float32, 1e-5)
    found = [candidate for candidate in CANDIDATES if isinstance(candidate, Cuda)]
    assert [candidate.name for candidate in found] == ["triton_fa3", "triton"]
    assert all(isinstance(candidate.supports(spec, device), No) for candidate in found)


def on_device(spec: OpSpec, name: str) -> CudaAttention:
    """The backend that a server would build; skips the test where it is refused."""
    from headrace.device.cuda import CudaDevice

    device = CudaDevice(0)
    candidate = next(candidate for candidate in CANDIDATES if candidate.name == name)
    answer = candidate.supports(spec, device)
    if isinstance(answer, No):
        pytest.skip(answer.why)
    return candidate.build(spec, device)


REAL = {
    "decode of one": decode_rows([577]),
    "ragged decode": decode_rows([1, 63, 64, 65, 576, 2049, 16, 9000, 128, 130]),
    "many of one length": decode_rows([576] * 64),
    "one long among many": decode_rows([500] * 63 + [20000]),
    "prompts": [(0, 1000), (0, 1), (0, 64), (0, 129)],
    "chunks": [(1000, 500), (64, 64), (2049, 3)],
    "mixed": [*decode_rows([576, 1, 3000]), (0, 700), (640, 300)],
    "mixed, all from zero": [*decode_rows([576, 1, 3000]), (0, 700), (0, 300)],
}
MODELS = {
    "llama": Heads(32, 8, 128),
    "one head a group": Heads(8, 8, 64),
    "groups of three": Heads(9, 3, 64),
    "one group": Heads(16, 1, 128),
    "dim 96": Heads(16, 8, 96),
    "dim 256": Heads(8, 4, 256),
}


# From this block size on FlashAttention-3 reads pages by the tensor copy engine.
FA3_TILE = 128


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model", "rows", "block", "window", "dtype"),
    [
        *(("llama", rows, 16, 0, torch.bfloat16) for rows in REAL),
        *(("llama", "ragged decode", block, 0, torch.bfloat16) for block in (1, 64)),
        *(("llama", "mixed", block, 0, torch.bfloat16) for block in (1, 64, 128)),
        *(("llama", "mixed", 16, window, torch.bfloat16) for window in (7, 300)),
        *((model, "mixed", 16, 0, torch.bfloat16) for model in list(MODELS)[1:]),
        *((model, "mixed", 16, 0, torch.float32) for model in MODELS),
        ("llama", "ragged decode", 16, 0, torch.float32),
        ("llama", "mixed", 16, 0, torch.float16),
    ],
)
@pytest.mark.parametrize("name", ["triton_fa3", "triton"])
def test_real_sizes(
    name: str, model: str, rows: str, block: int, window: int, dtype: torch.dtype
) -> None:
    heads = MODELS[model]
    spec = OpSpec(heads.q, heads.kv, heads.dim, dtype, 1e-5, sliding_window=window > 0)
    made = on_device(spec, name)
    case = make(REAL[rows], heads, block, dtype)
    if name == "triton_fa3" and block >= FA3_TILE:
        # It copies whole pages and weighs their tail with zero: nothing there may be NaN.
        for cache in case.caches:
            cache.nan_to_num_(0.0)
    check(case, made, window)
    if made.reads_fresh and window == 0:
        check(case, made, fresh=True)


FUSED = {
    "one": [577],
    "ragged": [1, 63, 64, 65, 576, 2049, 16, 9000, 128, 130],
    "many of one length": [576] * 64,
    "one long among many": [500] * 63 + [20000],
}


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("model", "lengths", "window", "dtype"),
    [
        *(("llama", lengths, 0, torch.bfloat16) for lengths in FUSED),
        *((model, "ragged", 0, torch.bfloat16) for model in list(MODELS)[1:]),
        *((model, "ragged", 0, torch.float32) for model in MODELS),
        ("llama", "ragged", 300, torch.bfloat16),
        ("llama", "ragged", 0, torch.float16),
    ],
)
def test_rotation_and_write_in_real_sizes(
    model: str, lengths: str, window: int, dtype: torch.dtype, norm: bool
) -> None:
    heads = MODELS[model]
    step = fused(FUSED[lengths], heads, 16, dtype, norm, padding=3)
    check_fused(step, backend(heads, dtype, None), window)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_step_serves_other_rows(dtype: torch.dtype) -> None:
    def run(made: CudaAttention, shape: DecodeShape, q_SHE: Tensor) -> Replay:
        graph = torch.cuda.CUDAGraph()
        made_for: list[Tensor] = []

        def replay(case: Case) -> Tensor:
            if not made_for:
                made.attend(q_SHE, *case.caches, made.plan_decode(shape))  # Compiles.
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    made_for.append(made.attend(q_SHE, *case.caches, made.plan_decode(shape)))
            made_for[0].fill_(torch.nan)
            graph.replay()
            return made_for[0]

        return replay

    replays(Heads(8, 2, 64), dtype, run)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [decode_rows([700, 30]), [(100, 300), (0, 50)]], ids=str)
@pytest.mark.parametrize("name", ["triton_fa3", "triton"])
def test_offsets_past_two_to_the_31(name: str, rows: list[tuple[int, int]]) -> None:
    """The pool's last blocks lie behind 2^31 numbers, where a 32-bit offset would turn negative."""
    heads, dtype = Heads(32, 8, 128), torch.bfloat16
    made = on_device(OpSpec(heads.q, heads.kv, heads.dim, dtype, 1e-5), name)
    case = make(rows, heads, 16, dtype)
    count = case.k_cache_NPKE.shape[0]
    behind = (1 << 31) // case.k_cache_NPKE[0].numel() + 7
    far = [
        torch.empty((behind + count, *cache.shape[1:]), dtype=dtype, device=DEVICE)
        for cache in case.caches
    ]
    for pool, cache in zip(far, case.caches, strict=True):
        pool[behind:] = cache
    shape = replace(case.shape, table_SB=case.shape.table_SB + behind)
    actual = made.attend(case.q_THE, *far, made.plan(shape))
    compare(actual, expect(case), dtype)


@triton.jit
def copy_late(source, target, clocks, BLOCK: tl.constexpr):
    gdc_launch_dependents()
    begin = tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    now = begin
    while now - begin < clocks:
        now = tl.inline_asm_elementwise(
            "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [decode_rows([700, 30]), [(100, 300), (0, 50)]], ids=str)
def test_a_predecessor_that_sleeps_before_it_writes(rows: list[tuple[int, int]]) -> None:
    """A kernel that is launched early must wait for the queries of one that is still at work."""
    if not gpu_here().pdl:
        pytest.skip("no programmatic dependent launch before Hopper")
    heads, dtype = Heads(32, 8, 128), torch.bfloat16
    case = make(rows, heads, 16, dtype)
    made = backend(heads, dtype, None, None)
    plan = made.plan(case.shape)
    source = case.q_THE.contiguous()
    expected = expect(case)
    compare(made.attend(source, *case.caches, plan), expected, dtype)
    q_THE = torch.full_like(source, torch.nan)
    torch.cuda.synchronize()
    copy_late[(q_THE.numel() // 1024,)](source, q_THE, 200_000, BLOCK=1024)
    actual = made.attend(q_THE, *case.caches, plan)
    compare(actual, expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[700, 30], [576] * 64], ids=["two", "many"])
def test_a_predecessor_that_sleeps_before_it_writes_the_projection(lengths: list[int]) -> None:
    if not gpu_here().pdl:
        pytest.skip("no programmatic dependent launch before Hopper")
    heads = Heads(32, 8, 128)
    step = fused(lengths, heads, 16, torch.bfloat16, norm=False)
    made = backend(heads, torch.bfloat16, None)
    (expected, *written), _ = step.twins(made, 0)
    plan = made.plan_decode(step.shape)
    late = torch.full_like(step.qkv_SC, torch.nan)
    k_cache, v_cache = step.case.caches
    for _ in range(3):
        late.fill_(torch.nan)
        torch.cuda.synchronize()
        copy_late[(late.numel() // 1024,)](step.qkv_SC, late, 200_000, BLOCK=1024)
        actual = made.rotate_and_attend(
            late, step.cos_sin_SE, k_cache, v_cache, step.cells_S, step.layout, None, plan
        )
        assert torch.equal(actual, expected)
    for cache, other in zip(step.case.caches, written, strict=True):
        torch.testing.assert_close(cache, other, rtol=0, atol=0, equal_nan=True)


# What the newest values are multiplied by: an output that missed its row's newest cell shows it.
DOMINANT = 64.0
CHAINED_LAYERS = 8
CHAINED_WIDTH = 1024
REPLAYS = 20


class Chain:
    """Fused launches of several layers, one behind another, or with products between."""

    def __init__(self, step: Fused, made: CudaAttention, products: bool) -> None:
        self._step, self._made, self._products = step, made, products
        self._random = torch.Generator(DEVICE).manual_seed(11)
        layout, dtype = step.layout, step.qkv_SC.dtype
        layers = range(CHAINED_LAYERS)
        self._caches = [[cache.clone() for cache in step.case.caches] for _ in layers]
        self._qkv = [torch.empty_like(step.qkv_SC) for _ in layers]
        self._outputs: list[Tensor] = []
        self._newest = slice(-layout.kv_heads * layout.head_dim, None)  # columns of values
        self._x_SD = self._randn(len(step.qkv_SC), CHAINED_WIDTH).to(dtype)
        self._matmul = CudaMatmul(device_gpu())
        qkv_CD = self._randn(layout.columns, CHAINED_WIDTH) * CHAINED_WIDTH**-0.5
        qkv_CD[self._newest] *= DOMINANT
        self._qkv_weight = self._matmul.pack(qkv_CD.to(dtype))
        out_DX = self._randn(CHAINED_WIDTH, layout.heads * layout.head_dim)
        self._out_weight = self._matmul.pack(out_DX.to(dtype))

    def run(self) -> None:
        """Launches all; may be captured."""
        step, x_SD = self._step, self._x_SD
        self._plan = self._made.plan_decode(step.shape)
        self._outputs = []
        for index, (k_cache, v_cache) in enumerate(self._caches):
            if self._products:
                self._qkv[index] = self._matmul.apply(x_SD, self._qkv_weight, None)
            o_SHE = self._made.rotate_and_attend(
                *(self._qkv[index], step.cos_sin_SE, k_cache, v_cache, step.cells_S),
                *(step.layout, step.norm, self._plan),
            )
            self._outputs.append(o_SHE)
            if self._products:
                y_SD = self._matmul.apply(o_SHE.flatten(1), self._out_weight, None)
                x_SD = torch.nn.functional.rms_norm(y_SD, (CHAINED_WIDTH,))

    def renew(self) -> None:
        """Gives the next run other numbers; the cells still hold what the last one wrote."""
        self._x_SD.copy_(self._randn(*self._x_SD.shape))
        for qkv_SC in () if self._products else self._qkv:
            qkv_SC.copy_(self._randn(*qkv_SC.shape))
            qkv_SC[:, self._newest] *= DOMINANT

    def check(self) -> None:
        """Compares each layer with two launches on the same projection."""
        step, plan = self._step, self._made.plan_decode(self._step.shape)
        rope = triton_rope_and_kv_write(gpu_here())
        for qkv_SC, ours, o_SHE in zip(self._qkv, self._caches, self._outputs, strict=True):
            theirs = [cache.clone() for cache in step.case.caches]
            q_SHE = rope(
                qkv_SC.clone(), step.cos_sin_SE, theirs[0], theirs[1], step.cells_S, step.layout,
                step.norm,
            )  # fmt: skip
            expected = self._made.attend(q_SHE, theirs[0], theirs[1], plan).float()
            assert expected.isfinite().all()
            error = (o_SHE.float() - expected).abs().amax(-1)
            is_right = error <= TOLERANCE[o_SHE.dtype] * expected.abs().amax(-1)
            count = int((~is_right).sum())
            assert count == 0, f"{count} of {is_right.numel()} heads are wrong"
            for our, their in zip(ours, theirs, strict=True):
                torch.testing.assert_close(our, their, rtol=0, atol=0, equal_nan=True)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, device=DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("products", [False, True], ids=["alone", "products"])
@pytest.mark.parametrize(("rows", "longest"), [(8, 3000), (32, 200), (64, 200), (256, 200)])
def test_every_row_sees_its_newest_cell(rows: int, longest: int, products: bool) -> None:
    """Launches overlap in a graph, where a cell's old keys and values would go unnoticed else."""
    heads, dtype = Heads(32, 8, 128), torch.bfloat16
    lengths = np.random.default_rng(rows).integers(1, longest, rows).tolist()
    step = fused(lengths, heads, 16, dtype, norm=False)
    made = on_device(OpSpec(heads.q, heads.kv, heads.dim, dtype, 1e-5), "triton")
    chain = Chain(step, made, products)
    chain.renew()
    chain.run()  # compiles
    chain.check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain.run()
    for _ in range(REPLAYS):
        chain.renew()
        graph.replay()
        chain.check()
