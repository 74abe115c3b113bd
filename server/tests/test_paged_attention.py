"""Every attention backend against the reference, in a pool whose other cells are NaN."""

# T tokens · S rows · H query heads · K kv heads · E head dim · N blocks · P tokens per block

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.device.cpu import CpuDevice
from headrace.ops.base import No, OpSpec
from headrace.ops.kv_write.base import CODES, UNIT, KvScales, encode
from headrace.ops.paged_attention import CANDIDATES, StepShape
from headrace.ops.paged_attention.reference import ReferenceAttention

BACKENDS = {candidate.name: candidate for candidate in CANDIDATES}
FAST = list(BACKENDS)[:-1]
# Relative to the largest value: float32 sums in another order; bfloat16 also rounds the softmax.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}

# (tokens before the step, tokens of the step) of each row
ROWS = {
    "one decode row": [(16, 1)],
    "first token": [(0, 1)],
    "decode rows of one length": [(40, 1)] * 5,
    "ragged decode rows": [(3, 1), (200, 1), (0, 1), (90, 1), (17, 1), (201, 1), (64, 1)],
    "one prompt": [(0, 33)],
    "later chunk": [(19, 30)],
    "ragged prompts": [(0, 5), (0, 64), (7, 2), (31, 33)],
    "mixed": [(50, 1), (0, 20), (3, 1), (9, 12), (120, 1)],
}


@dataclass(frozen=True)
class Case:
    """A pool with the contexts of some rows, and their queries."""

    q_THE: Tensor
    k_cache_NPKE: Tensor
    v_cache_NPKE: Tensor
    shape: StepShape


def make(
    rows: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, block: int, dtype: str
) -> Case:
    """Scatters the rows' blocks over a pool of NaN; the tables' unused entries name block 0."""
    random = torch.Generator().manual_seed(len(rows) + heads + head_dim + block)
    starts = np.array([start for start, _ in rows], dtype=np.int32)
    lengths = np.array([length for _, length in rows], dtype=np.int32)
    contexts = starts + lengths
    counts = -(-contexts // block)
    blocks = int(counts.sum()) + 3
    order = torch.randperm(blocks - 1, generator=random) + 1
    table_SB = torch.zeros((len(rows), int(counts.max()) + 1), dtype=torch.int32)
    kv_dtype = getattr(torch, dtype)
    caches = [torch.full((blocks, block, kv_heads, head_dim), torch.nan) for _ in range(2)]
    at = 0
    for row, count in enumerate(counts.tolist()):
        mine = order[at : at + count]
        table_SB[row, :count] = mine.int()
        at += count
        cells = (mine[:, None] * block + torch.arange(block)).flatten()[: contexts[row]]
        for cache in caches:
            values = torch.randn((len(cells), kv_heads, head_dim), generator=random)
            cache.view(-1, kv_heads, head_dim)[cells] = values
    # Rows of queries are strided, as they are when they are a view of the fused projection.
    qkv = torch.randn((int(lengths.sum()), heads + 2, head_dim), generator=random).to(kv_dtype)
    k_cache, v_cache = (cache.to(kv_dtype) for cache in caches)
    return Case(qkv[:, :heads], k_cache, v_cache, StepShape(starts, lengths, table_SB, block))


def check(backend: str, case: Case, window: int, stored: torch.dtype | None = None) -> None:
    dtype = case.q_THE.dtype
    _, heads, head_dim = case.q_THE.shape
    kv_heads = case.k_cache_NPKE.shape[2]
    spec = OpSpec(
        heads, kv_heads, head_dim, dtype, 1e-5, sliding_window=window > 0, kv_dtype=stored
    )
    device = CpuDevice(threads=2)
    answer = BACKENDS[backend].supports(spec, device)
    if isinstance(answer, No):
        pytest.skip(answer.why)
    made = BACKENDS[backend].build(spec, device)
    caches: list[Tensor] = [case.k_cache_NPKE, case.v_cache_NPKE]
    wide, scales = [cache.float() for cache in caches], UNIT
    if stored is not None:
        scales = KvScales(0.5, 4.0)
        both = (scales.k, scales.v)
        caches = [encode(cache, stored, scale) for cache, scale in zip(wide, both, strict=True)]
        wide = [cache.float() * scale for cache, scale in zip(caches, both, strict=True)]
    before = case.q_THE.clone()
    actual = made.attend(case.q_THE, *caches, made.plan(case.shape), window, None, scales)
    assert torch.equal(case.q_THE, before), "queries must be left alone"
    assert actual.is_contiguous()
    assert actual.dtype == dtype
    oracle = ReferenceAttention()
    expected = oracle.attend(case.q_THE.float(), *wide, oracle.plan(case.shape), window)
    assert expected.isfinite().all()
    bound = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("stored", CODES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", ["torch_cpu", "reference"])
def test_caches_of_codes(
    backend: str, rows: str, window: int, dtype: str, stored: torch.dtype
) -> None:
    check(backend, make(ROWS[rows], 9, 3, 64, 16, dtype), window, stored)


def test_who_cannot_read_codes_says_so() -> None:
    spec = OpSpec(9, 3, 64, torch.bfloat16, 1e-5, kv_dtype=torch.float8_e5m2)
    answer = BACKENDS["native"].supports(spec, CpuDevice(threads=1))
    assert isinstance(answer, No) and "float8_e5m2" in answer.why


@pytest.mark.parametrize("stored", CODES, ids=str)
def test_what_is_kept_saturates_and_nan_stays(stored: torch.dtype) -> None:
    most = torch.finfo(stored).max
    x = torch.tensor([1e9, -1e9, torch.inf, torch.nan, 1.0, 0.0, 3 * most, -most])
    kept = encode(x, stored, 2.0).float()
    assert kept[:3].tolist() == [most, -most, most] and kept[3].isnan()
    assert kept[4:].tolist() == [0.5, 0.0, most, -most / 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 7, 64])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", FAST)
def test_rows_of_every_kind(backend: str, rows: str, window: int, dtype: str) -> None:
    check(backend, make(ROWS[rows], 9, 3, 64, 16, dtype), window)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [1, 8, 32, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 8), (8, 2), (7, 1), (12, 4)])
@pytest.mark.parametrize("head_dim", [16, 40, 80, 128, 256])
@pytest.mark.parametrize("backend", FAST)
def test_heads_and_blocks_of_every_shape(
    backend: str, head_dim: int, heads: int, kv_heads: int, block: int, dtype: str
) -> None:
    check(backend, make(ROWS["mixed"], heads, kv_heads, head_dim, block, dtype), 0)


def test_a_plan_serves_layers_with_and_without_a_window() -> None:
    case = make(ROWS["mixed"], 8, 2, 16, 16, "float32")
    caches = case.k_cache_NPKE, case.v_cache_NPKE
    oracle = ReferenceAttention()
    spec = OpSpec(8, 2, 16, torch.float32, 1e-5, sliding_window=True)
    device = CpuDevice(threads=1)
    for candidate in BACKENDS.values():
        if isinstance(candidate.supports(spec, device), No):
            continue
        made = candidate.build(spec, device)
        plan = made.plan(case.shape)
        for window in (5, 0, 5):
            expected = oracle.attend(case.q_THE, *caches, case.shape, window)
            actual = made.attend(case.q_THE, *caches, plan, window)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
