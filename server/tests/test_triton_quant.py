"""Products with coded weights by Triton: in its interpreter, or on a device if there is one."""

# T tokens · Y outputs · I inputs

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from coded_weights import CODES, coded, numbers_of, rows_of
from device_here import DEVICE, device_gpu

from conftest import CUDA
from headrace.ops.quant_matmul.base import CodedWeight
from headrace.ops.quant_matmul.triton import ROWS_MAX, TritonCodedMatmul

# Relative to the largest value: weights are rounded to the dtype (the interpreter rounds bfloat16
# down), and so is the result.
TOLERANCE = {torch.bfloat16: 2.5e-2, torch.float16: 4e-3, torch.float32: 1e-5}


def here(weight: CodedWeight) -> CodedWeight:
    """The weight on the device."""
    zeros, values = weight.zeros_YG, weight.values
    return replace(
        weight,
        codes=weight.codes.to(DEVICE),
        scales_YG=weight.scales_YG.to(DEVICE),
        zeros_YG=None if zeros is None else zeros.to(DEVICE),
        values=None if values is None else values.to(DEVICE),
    )


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape and actual.dtype == dtype
    bound = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=bound)


# Groups of a step and more, whole rows, one that no step divides; edges of all tiles.
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "group"),
    [
        (1, 128, 64, 128),
        (3, 160, 70, 32),
        (17, 192, 65, 64),
        (ROWS_MAX, 72, 40, 72),
        (ROWS_MAX + 1, 160, 70, 64),
        (2, 96, 40, 24),
    ],
)
@pytest.mark.parametrize("codes", CODES)
def test_products_are_those_of_the_numbers(
    rows: int, inputs: int, outputs: int, group: int, codes: str
) -> None:
    dtype = torch.float16
    weight = coded(codes, outputs, inputs, group)
    x_TI, bias_Y = rows_of(rows, inputs, dtype), torch.randn(outputs).to(dtype)
    expected_TY = x_TI.double() @ numbers_of(weight).T
    matmul = TritonCodedMatmul(device_gpu())
    packed = matmul.pack(here(weight))
    y_TY = matmul.apply(x_TI.to(DEVICE), packed, None)
    assert_near(y_TY, expected_TY, dtype)
    y_TY = matmul.apply(x_TI.to(DEVICE), packed, bias_Y.to(DEVICE))
    assert_near(y_TY, expected_TY + bias_Y.double(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_activations_may_have_any_dtype(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not CUDA:
        pytest.skip("the interpreter multiplies the bits of bfloat16 matrices, not their values")
    weight, x_TI = coded("int4", 33, 96, 32), rows_of(5, 96, dtype)
    matmul = TritonCodedMatmul(device_gpu())
    y_TY = matmul.apply(x_TI.to(DEVICE), matmul.pack(here(weight)), None)
    assert_near(y_TY, x_TI.double() @ numbers_of(weight).T, dtype)


@pytest.mark.parametrize("codes", CODES)
def test_weights_are_widened_to_their_numbers(codes: str) -> None:
    weight = coded(codes, 37, 150, 32)
    matmul = TritonCodedMatmul(device_gpu())
    weight_YI = matmul.widen(matmul.pack(here(weight)), torch.float32)
    torch.testing.assert_close(weight_YI.cpu().double(), numbers_of(weight), rtol=1e-6, atol=1e-7)
