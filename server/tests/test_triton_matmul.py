"""The matrix products of few rows: in Triton's interpreter, or on a device if there is one."""

# M rows · N outputs · K inputs

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from device_here import DEVICE, device_gpu
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from conftest import CUDA
from headrace.ops.matmul import GatedMatmul
from headrace.ops.matmul.cuda import CudaMatmul
from headrace.ops.matmul.settings import BUCKETS, H200, H200_GATED, Setting, best

# Relative to the largest value: one rounding to the dtype (the interpreter rounds bfloat16 down),
# and the order of a float32 sum.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3}

VECTOR = Setting(rows=1, block_n=4, block_k=32, stages=2)
TILE = Setting(rows=16, block_n=16, block_k=32, stages=2)
SWAPPED = replace(TILE, block_n=64, swap=True)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(DEVICE)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    bound = TOLERANCE[actual.dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=bound)


def product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, setting: Setting) -> Tensor:
    """The setting's product, whatever the bucket."""
    matmul = CudaMatmul(device_gpu())
    packed = matmul.pack_as(weight_NK, (setting,) * len(BUCKETS))
    y_MN = matmul.apply(x_MK, packed, bias_N)
    assert_no_ticket_is_left(matmul)
    return y_MN


def assert_no_ticket_is_left(matmul: CudaMatmul) -> None:
    assert matmul._scratch is not None
    assert not matmul._scratch.arrived.any()


CASES = [
    pytest.param(setting, rows, outputs, inputs, id=f"{name}-M{rows}-N{outputs}-K{inputs}")
    for name, setting, rows, outputs, inputs in (
        ("vector", VECTOR, 1, 24, 96),
        ("vector", VECTOR, 1, 7, 50),
        ("vector", replace(VECTOR, block_n=1), 1, 3, 32),
        ("tile", TILE, 2, 48, 96),
        ("tile", TILE, 16, 19, 41),
        ("split", replace(TILE, split=2), 3, 48, 128),
        ("split", replace(TILE, split=4), 5, 37, 331),
        ("split-beyond-K", replace(TILE, split=4), 2, 16, 40),
        ("swapped", SWAPPED, 9, 64, 64),
        ("swapped", replace(SWAPPED, rows=32), 17, 100, 72),
        ("swapped-split", replace(SWAPPED, rows=64, split=3), 64, 65, 203),
        ("vector-ahead", replace(VECTOR, ahead=True), 1, 7, 50),
        ("vector-ahead-of-all", replace(VECTOR, ahead=True), 1, 8, 32),
        ("tile-ahead", replace(TILE, ahead=True), 5, 19, 41),
        ("split-ahead", replace(TILE, split=4, ahead=True), 5, 37, 331),
    )
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("setting", "rows", "outputs", "inputs"), CASES)
def test_a_product_is_that_in_float64(
    setting: Setting, rows: int, outputs: int, inputs: int, bias: bool, dtype: torch.dtype
) -> None:
    if setting.rows > 1 and dtype == torch.bfloat16 and not CUDA:
        pytest.skip("the interpreter multiplies the bits of bfloat16 matrices, not their values")
    x_MK = random(rows, inputs, dtype=dtype, seed=1)
    weight_NK = random(outputs, inputs, dtype=dtype, seed=2)
    bias_N = random(outputs, dtype=dtype, seed=3) if bias else None
    y_MN = product(x_MK, weight_NK, bias_N, setting)
    assert y_MN.shape == (rows, outputs)
    assert y_MN.dtype == dtype
    expected = x_MK.double() @ weight_NK.double().T
    assert_near(y_MN, expected if bias_N is None else expected + bias_N.double())


@pytest.mark.parametrize(
    ("setting", "rows"),
    [
        (VECTOR, 1),
        (replace(VECTOR, ahead=True), 1),
        (TILE, 5),
        (replace(TILE, ahead=True), 5),
        (replace(SWAPPED, rows=32), 20),
    ],
    ids=["vector", "vector-ahead", "tile", "tile-ahead", "swapped"],
)
def test_a_gated_product_is_the_product_and_the_activation(setting: Setting, rows: int) -> None:
    width, inputs = 71, 88
    x_MK = random(rows, inputs, dtype=torch.float16, seed=1)
    weight_NK = random(2 * width, inputs, dtype=torch.float16, seed=2)
    settings = (replace(setting, gated=True),) * len(BUCKETS)
    matmul = CudaMatmul(device_gpu())
    packed = matmul.pack_as(weight_NK, (None,) * len(BUCKETS), settings)
    assert isinstance(matmul, GatedMatmul)
    act_MF = matmul.apply_gated(x_MK, packed)
    gate_MF, up_MF = (x_MK.double() @ weight_NK.double().T).chunk(2, dim=1)
    assert act_MF is not None
    # Gate, up and activation are rounded on the way: three roundings more, but of smaller numbers.
    assert_near(act_MF, F.silu(gate_MF) * up_MF)


@pytest.mark.parametrize("setting", [TILE, replace(SWAPPED, split=2)], ids=["tile", "split"])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_their_number(setting: Setting) -> None:
    x_MK = random(11, 160, dtype=torch.float16, seed=1)
    weight_NK = random(70, 160, dtype=torch.float16, seed=2)
    together = product(x_MK, weight_NK, None, setting)
    assert torch.equal(product(x_MK[4:7], weight_NK, None, setting), together[4:7])
    x_MK = x_MK.clone()
    x_MK[5] = float("inf")
    kept = [row for row in range(11) if row != 5]
    assert torch.equal(product(x_MK, weight_NK, None, setting)[kept], together[kept])


@pytest.mark.parametrize("setting", [TILE, replace(SWAPPED, split=2)], ids=["tile", "split"])
def test_rows_may_lie_apart(setting: Setting) -> None:
    wide = random(6, 200, dtype=torch.float16, seed=1)
    weight_NK = random(40, 96, dtype=torch.float16, seed=2)
    apart = wide[:, 8:104]
    expected = product(apart.contiguous(), weight_NK, None, setting)
    assert torch.equal(product(apart, weight_NK, None, setting), expected)
    turned = apart.T.contiguous().T  # neither do its numbers lie side by side
    assert torch.equal(product(turned, weight_NK, None, setting), expected)


def test_no_rows_and_many_rows_are_the_librarys() -> None:
    weight_NK = random(24, 32, dtype=torch.float16, seed=2)
    matmul = CudaMatmul(device_gpu())
    packed = matmul.pack_as(weight_NK, (VECTOR, TILE, TILE, TILE), (None,) * len(BUCKETS))
    for rows in (0, 65):
        x_MK = random(rows, 32, dtype=torch.float16, seed=1)
        y_MN = matmul.apply(x_MK, packed, None)
        assert torch.equal(y_MN, F.linear(x_MK, weight_NK))
        assert matmul.apply_gated(x_MK, packed) is None


def test_every_setting_fits_its_bucket() -> None:
    tables = [*H200.values(), *H200_GATED.values(), best(8192, 3584), best(3072, 2048)]
    for settings in tables:
        assert len(settings) == len(BUCKETS)
        for setting, bucket in zip(settings, BUCKETS, strict=True):
            if setting is not None:
                assert setting.rows == bucket
                assert not (setting.gated and setting.split > 1)
                # A thread asks for a row.
                assert setting.block_n <= 32 * setting.warps


# === on a device ===


def settings_of(table: dict[tuple[int, int], tuple[Setting | None, ...]]) -> list[object]:
    return [
        pytest.param(setting, outputs, inputs, id=f"{outputs}x{inputs}-M{setting.rows}")
        for (outputs, inputs), settings in table.items()
        for setting in settings
        if setting is not None
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("setting", "outputs", "inputs"), settings_of(H200))
def test_every_setting_is_right_and_repeats_itself(
    setting: Setting, outputs: int, inputs: int
) -> None:
    x_MK = random(setting.rows, inputs, dtype=torch.bfloat16, seed=1)
    weight_NK = torch.randn(outputs, inputs, device=DEVICE, dtype=torch.bfloat16)
    first = product(x_MK, weight_NK, None, setting)
    assert_near(first, x_MK.float() @ weight_NK.float().T)
    for _ in range(20):
        assert torch.equal(product(x_MK, weight_NK, None, setting), first)


@triton.jit
def write_late(source, x, turns, SIZE: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(source + at).to(tl.float32)
    for _ in range(2 * turns):  # nobody can shorten a chain of roundings
        value = 1e-6 - value
    tl.store(x + at, value.to(x.dtype.element_ty))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "setting",
    [
        Setting(1, 16, 512, 4, prefetch=64),
        Setting(1, 4, 2048, 2, ahead=True),
        Setting(16, 64, 128, 4, split=4, swap=True, prefetch=64),
        Setting(16, 64, 128, 4, split=4, swap=True, ahead=True),
    ],
    ids=["vector", "vector-ahead", "split", "split-ahead"],
)
def test_the_input_is_waited_for(setting: Setting) -> None:
    """Behind a predecessor that lets its dependents start, sleeps, and only then writes."""
    outputs, inputs = 4096, 4096
    weight_NK = torch.randn(outputs, inputs, device=DEVICE, dtype=torch.bfloat16)
    matmul = CudaMatmul(device_gpu())
    packed = matmul.pack_as(weight_NK, (setting,) * len(BUCKETS))
    x_MK = torch.empty(setting.rows, inputs, device=DEVICE, dtype=torch.bfloat16)
    for seed in range(8):
        source = random(setting.rows, inputs, dtype=torch.bfloat16, seed=seed)
        x_MK.fill_(float("nan"))
        grid = (setting.rows * inputs // 512,)
        device_gpu().run(write_late, grid, source, x_MK, 100_000, warps=4, SIZE=512)
        y_MN = matmul.apply(x_MK, packed, None)
        assert_near(y_MN, source.float() @ weight_NK.float().T)
