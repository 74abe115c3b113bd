"""Products with coded weights: every implementation against the float64 product of the numbers."""

# T tokens · Y outputs · I inputs · G groups of inputs

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from coded_weights import CODES, coded, numbers_of, rows_of
from torch import Tensor

from headrace import native
from headrace.native import Isa, Kernels
from headrace.ops.quant_matmul import CodedWeight, Kind
from headrace.ops.quant_matmul.native import NativeCodedMatmul
from headrace.ops.quant_matmul.reference import ReferenceCodedMatmul

LOADED = native.load()
DTYPES = [torch.float32, torch.bfloat16]
# Rows, inputs, outputs, group: panels and tiles that are full, that are not, groups that end early.
SHAPES = [
    (1, 64, 32, 32),
    (1, 576, 960, 64),
    (2, 96, 40, 96),
    (3, 160, 33, 128),
    (5, 30, 7, 30),
    (13, 320, 100, 32),
    (130, 640, 65, 128),
]


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape and actual.dtype == dtype
    bound = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2}[dtype]
    atol = bound * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("rows", "inputs", "outputs", "group"), SHAPES)
def test_the_reference_multiplies_the_numbers(
    rows: int, inputs: int, outputs: int, group: int, codes: str, dtype: torch.dtype
) -> None:
    weight = coded(codes, outputs, inputs, group)
    x_TI, bias_Y = rows_of(rows, inputs, dtype), torch.randn(outputs).to(dtype)
    matmul = ReferenceCodedMatmul()
    expected_TY = x_TI.double() @ numbers_of(weight).T
    packed = matmul.pack(weight)
    assert_near(matmul.apply(x_TI, packed, None), expected_TY, dtype)
    assert_near(matmul.apply(x_TI, packed, bias_Y), expected_TY + bias_Y.double(), dtype)


@pytest.fixture(params=list(Isa), ids=lambda isa: isa.name.lower())
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The library with one instruction set forced and three threads, more than some CPUs have."""
    if isinstance(LOADED, str):
        pytest.skip(LOADED)
    if request.param > LOADED.best_isa:
        pytest.skip(f"this CPU has no {request.param.name.lower()}")
    assert LOADED.set_isa(request.param) == request.param
    LOADED.set_threads(3)
    yield LOADED
    LOADED.set_isa(None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("rows", "inputs", "outputs", "group"), SHAPES)
def test_the_kernel_library_multiplies_the_numbers(
    kernels: Kernels,
    rows: int,
    inputs: int,
    outputs: int,
    group: int,
    codes: str,
    dtype: torch.dtype,
) -> None:
    weight = coded(codes, outputs, inputs, group)
    x_TI, bias_Y = rows_of(rows, inputs, dtype), torch.randn(outputs).to(dtype)
    matmul = NativeCodedMatmul(kernels)
    expected_TY = x_TI.double() @ numbers_of(weight).T
    packed = matmul.pack(weight)
    assert_near(matmul.apply(x_TI, packed, None), expected_TY, dtype)
    assert_near(matmul.apply(x_TI, packed, bias_Y), expected_TY + bias_Y.double(), dtype)


def test_the_kernel_library_knows_every_number_of_eight_bits(kernels: Kernels) -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        every = torch.arange(256, dtype=torch.uint8).view(dtype)
        every = every[every.float().isfinite()]
        size = len(every) // 2 * 2
        codes = every[:size].view(1, size)
        weight = CodedWeight(Kind.FP8, codes, torch.ones(1, 1), size, size)
        matmul = NativeCodedMatmul(kernels)
        for rows in (1, size):
            y_TY = matmul.apply(torch.eye(size)[:rows], matmul.pack(weight), None)
            assert torch.equal(y_TY[:, 0], codes[0, :rows].float())


def test_columns_in_another_order_are_put_back() -> None:
    weight = coded("int4", 8, 64, 32)
    order_I = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    moved = CodedWeight(Kind.INT4, weight.codes, weight.scales_YG, 32, 64, weight.zeros_YG, order_I)
    expected_YX = torch.empty(8, 64, dtype=torch.float64)
    expected_YX[:, order_I] = numbers_of(weight)
    torch.testing.assert_close(moved.dequantize().double(), expected_YX, rtol=1e-6, atol=1e-6)
