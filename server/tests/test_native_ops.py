"""Every native operation against its reference twin, on every instruction set of this CPU."""

# T tokens · D width · F mlp width · H query heads · K kv heads · E head dim · Y outputs · X inputs
# N blocks · P tokens per block · S rows · B blocks per table row

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace import native
from headrace.native import Isa, Kernels, type_of
from headrace.ops.matmul.native import NativeMatmul
from headrace.ops.paged_attention import StepShape
from headrace.ops.paged_attention.native import NativeAttention
from headrace.ops.paged_attention.reference import ReferenceAttention
from headrace.ops.rms_norm import reference as rms_norm_reference
from headrace.ops.rms_norm.native import NativeRmsNorm
from headrace.ops.rope import QkNorm, QkvLayout
from headrace.ops.rope import reference as rope_reference
from headrace.ops.rope.native import native_rope_and_kv_write
from headrace.ops.silu_mul import reference as silu_mul_reference
from headrace.ops.silu_mul.native import native_silu_mul

LOADED = native.load()
pytestmark = pytest.mark.skipif(isinstance(LOADED, str), reason=str(LOADED))

DTYPES = [torch.float32, torch.bfloat16]
# Relative to the largest number of the expected result: float32 sums in another order, and one
# rounding to bfloat16 more or less than the reference.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}


@pytest.fixture(params=list(Isa), ids=lambda isa: isa.name.lower())
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The library with one instruction set forced and three threads, more than some CPUs have."""
    assert isinstance(LOADED, Kernels)
    if request.param > LOADED.best_isa:
        pytest.skip(f"this CPU has no {request.param.name.lower()}")
    assert LOADED.set_isa(request.param) == request.param
    LOADED.set_threads(3)
    yield LOADED
    LOADED.set_isa(None)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    bound = TOLERANCE[dtype] * float(expected.float().abs().max().clamp(min=1e-6))
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 64, 32),
        (1, 577, 33),
        (2, 576, 960),
        (3, 30, 7),
        (13, 128, 100),
        (25, 96, 64),
        (70, 40, 65),
    ],
)
def test_matmul_is_the_product_in_float64(
    kernels: Kernels, rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    x_TX = random(rows, inputs + 3, dtype=dtype)[
        :, :inputs
    ]  # rows further apart than they are long
    weight_YX = random(outputs, inputs, dtype=dtype, seed=1)
    bias_Y = random(outputs, dtype=dtype, seed=2)
    matmul = NativeMatmul(kernels)
    packed = matmul.pack(weight_YX)
    expected_TY = x_TX.double() @ weight_YX.double().T
    assert_near(matmul.apply(x_TX, packed, None), expected_TY, dtype)
    assert_near(matmul.apply(x_TX, packed, bias_Y), expected_TY + bias_Y.double(), dtype)


def test_float32_weights_that_are_bfloat16_are_kept_so_and_lose_nothing(kernels: Kernels) -> None:
    x_TX = random(5, 200, dtype=torch.float32)
    rounded_YX = random(70, 200, dtype=torch.bfloat16, seed=1).float()
    matmul = NativeMatmul(kernels)
    narrow, wide = matmul.pack(rounded_YX), matmul.pack(rounded_YX + 1e-4)
    assert (narrow.type, wide.type) == (type_of(torch.bfloat16), type_of(torch.float32))
    expected_TY = x_TX.double() @ rounded_YX.double().T
    assert_near(matmul.apply(x_TX, narrow, None), expected_TY, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 576), (3, 17), (70, 576), (2, 5)])
def test_norms_are_the_reference(
    kernels: Kernels, tokens: int, width: int, dtype: torch.dtype
) -> None:
    ops = NativeRmsNorm(kernels)
    x_TD, residual_TD = (
        random(tokens, width, dtype=dtype),
        random(tokens, width, dtype=dtype, seed=1),
    )
    weight_D = random(width, dtype=dtype, seed=2)
    expected_TD = rms_norm_reference.rms_norm(x_TD, weight_D, 1e-5)
    assert_near(ops.rms_norm(x_TD, weight_D, 1e-5), expected_TD, dtype)
    expected_TD, sum_TD = rms_norm_reference.add_rms_norm(x_TD, residual_TD, weight_D, 1e-5)
    actual_TD, actual_sum_TD = ops.add_rms_norm(x_TD, residual_TD.clone(), weight_D, 1e-5)
    assert_near(actual_TD, expected_TD, dtype)
    assert torch.equal(actual_sum_TD, sum_TD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1536), (3, 17), (40, 1000)])
def test_silu_mul_is_the_reference(
    kernels: Kernels, tokens: int, width: int, dtype: torch.dtype
) -> None:
    gate_up_T2F = random(tokens, 2 * width, dtype=dtype) * 20
    expected_TF = silu_mul_reference.silu_mul(gate_up_T2F)
    assert_near(native_silu_mul(kernels)(gate_up_T2F), expected_TF, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 1, 10), (2, 2, 48)])
def test_rotation_writes_the_cells_it_is_given_and_no_others(
    kernels: Kernels, heads: int, kv_heads: int, dim: int, norm: bool, dtype: torch.dtype
) -> None:
    tokens, blocks, block_tokens = 5, 4, 3
    layout = QkvLayout(heads, kv_heads, dim)
    qkv_TC = random(tokens, layout.columns, dtype=dtype)
    angles_TE = random(tokens, dim // 2, dtype=torch.float32, seed=3)
    cos_sin_TE = torch.cat((angles_TE.cos(), angles_TE.sin()), dim=1)
    q_E, k_E = random(dim, dtype=dtype, seed=4), random(dim, dtype=dtype, seed=5)
    qk_norm = QkNorm(q_E, k_E, 1e-6) if norm else None
    cells_T = torch.tensor([11, 0, 4, 5, 7])
    caches = [poisoned(blocks, block_tokens, kv_heads, dim, dtype=dtype) for _ in range(4)]
    expected_THE = rope_reference.rope_and_kv_write(
        qkv_TC.clone(), cos_sin_TE, caches[0], caches[1], cells_T, layout, qk_norm
    )
    q_THE = native_rope_and_kv_write(kernels)(
        qkv_TC.clone(), cos_sin_TE, caches[2], caches[3], cells_T, layout, qk_norm
    )
    assert_near(q_THE, expected_THE, dtype)
    for expected, actual in zip(caches[:2], caches[2:], strict=True):
        expected_TKE, actual_TKE = expected.flatten(0, 1), actual.flatten(0, 1)
        assert_near(actual_TKE[cells_T], expected_TKE[cells_T], dtype)
        untouched = sorted(set(range(blocks * block_tokens)) - set(cells_T.tolist()))
        assert actual_TKE[untouched].isnan().all()


ROWS = {
    "one token": [(0, 1)],
    "decode": [(0, 1), (5, 1), (40, 1), (16, 1)],
    "long decode": [(700, 1)],
    "long and short": [(1100, 1), (3, 1)],
    "prefill": [(0, 47)],
    "long prefill": [(131, 140)],
    "mixed": [(33, 1), (0, 2), (17, 35), (200, 1), (64, 5)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_tokens"),
    [
        (9, 3, 64, 16),
        (8, 8, 32, 32),
        (4, 1, 128, 16),
        (7, 1, 80, 5),
        (2, 2, 256, 16),
        (4, 2, 10, 16),
    ],
)
def test_attention_is_the_reference_in_a_poisoned_pool(
    kernels: Kernels,
    heads: int,
    kv_heads: int,
    dim: int,
    block_tokens: int,
    rows: list[tuple[int, int]],
    window: int,
    dtype: torch.dtype,
) -> None:
    starts, lengths = (np.array(column, dtype=np.int32) for column in zip(*rows, strict=True))
    per_row = [-(-int(context) // block_tokens) for context in starts + lengths]
    blocks = sum(per_row) + 3
    ids = torch.randperm(blocks, generator=torch.Generator().manual_seed(6)).tolist()
    table_SB = torch.zeros(len(rows), max(per_row) + 1, dtype=torch.int32)
    caches = [poisoned(blocks, block_tokens, kv_heads, dim, dtype=dtype) for _ in range(2)]
    for row, count in enumerate(per_row):
        mine = [ids.pop() for _ in range(count)]
        table_SB[row, :count] = torch.tensor(mine)
        context = int(starts[row] + lengths[row])
        cells = torch.tensor(
            [mine[t // block_tokens] * block_tokens + t % block_tokens for t in range(context)]
        )
        first = max(0, int(starts[row]) - window + 1) if window else 0
        for seed, cache in enumerate(caches):
            kv_LKE = random(context, kv_heads, dim, dtype=dtype, seed=10 * row + seed)
            cache.flatten(0, 1)[cells[first:]] = kv_LKE[first:]
    tokens = int(lengths.sum())
    # Rows of queries lie apart, as they do in a fused projection.
    q_THE = random(tokens, heads + 2, dim, dtype=dtype, seed=99)[:, :heads] * 2
    shape = StepShape(starts, lengths, table_SB, block_tokens)
    backend = NativeAttention(kernels)
    actual_THE = backend.attend(q_THE, *caches, backend.plan(shape), window)
    # The reference multiplies masked values with zero: its pool holds zeros instead of poison.
    clean = [cache.nan_to_num() for cache in caches]
    expected_THE = ReferenceAttention().attend(q_THE, *clean, shape, window)
    assert actual_THE.is_contiguous()
    assert_near(actual_THE, expected_THE, dtype)
