"""Products with coded weights by Triton: in its interpreter, or on a device if there is one."""

# T tokens · Y outputs · I inputs

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from coded_weights import CODES, coded, here, numbers_of, rows_of
from device_here import DEVICE, device_gpu

from conftest import CUDA
from headrace.ops.matmul.settings import Setting
from headrace.ops.matmul.skinny import Scratch
from headrace.ops.quant_matmul import channels, groups
from headrace.ops.quant_matmul.base import CodedWeight
from headrace.ops.quant_matmul.settings import BUCKETS
from headrace.ops.quant_matmul.triton import ROWS_MAX, TritonCodedMatmul
from headrace.ops.rows8.reference import quantize_rows
from headrace.ops.triton import FP8_CAPABILITY

# Relative to the largest value: weights are rounded to the dtype (the interpreter rounds bfloat16
# down), and so is the result.
TOLERANCE = {torch.bfloat16: 2.5e-2, torch.float16: 4e-3, torch.float32: 1e-5}


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
    weight_YI = matmul.widen(matmul.pack_codes(here(weight)), torch.float32)
    torch.testing.assert_close(weight_YI.cpu().double(), numbers_of(weight), rtol=1e-6, atol=1e-7)


def symmetric(weight: CodedWeight) -> CodedWeight:
    """The weight with all zero points in the middle, and scales that float16 has."""
    zeros = torch.full_like(weight.scales_YG, 8.0)
    return replace(weight, zeros_YG=zeros, scales_YG=weight.scales_YG.half().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codes", ["zeros", "symmetric", "nf4"])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(64, 256, 128), (70, 384, 128), (130, 256, 256), (70, 256, 64)]
)
def test_groups_of_four_bits_are_multiplied_tile_by_tile(
    outputs: int, inputs: int, group: int, codes: str, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and not CUDA:
        pytest.skip("the interpreter multiplies the bits of bfloat16 matrices, not their values")
    weight = coded("nf4" if codes == "nf4" else "int4", outputs, inputs, group)
    weight = symmetric(weight) if codes == "symmetric" else weight
    assert groups.refusal(weight, dtype) is None
    gpu, scratch = device_gpu(), Scratch(DEVICE)
    packed = groups.pack(here(weight), dtype, scratch)
    assert (packed.less_GN is None) == (codes != "zeros")
    assert (packed.scales_GN.dtype == torch.float16) == (codes == "symmetric")
    for rows in (1, 16, 17, ROWS_MAX, ROWS_MAX + 1):
        x_TI, bias_Y = rows_of(rows, inputs, dtype), torch.randn(outputs).to(dtype)
        expected_TY = x_TI.double() @ numbers_of(weight).T + bias_Y.double()
        y_TY = groups.multiply(x_TI.to(DEVICE), packed, bias_Y.to(DEVICE), scratch, gpu)
        assert_near(y_TY, expected_TY, dtype)
        for split, swap in ((1, True), (2, False), (3, True)):
            setting = Setting(64, 64, 128, 2, split, swap=swap, prefetch=16)
            scratch.reserve(setting, outputs)
            if rows <= ROWS_MAX:
                y_TY = groups.product(
                    x_TI.to(DEVICE), packed, bias_Y.to(DEVICE), setting, scratch, gpu
                )
                assert_near(y_TY, expected_TY, dtype)
                assert not scratch.arrived.any()


def test_groups_refuse_what_they_cannot_read() -> None:
    assert "eight bits" in (groups.refusal(coded("int8", 64, 128, 64), torch.float16) or "")
    assert "multiple" in (groups.refusal(coded("int4", 64, 192, 64), torch.float16) or "")
    assert "groups of 32" in (groups.refusal(coded("int4", 64, 256, 32), torch.float16) or "")
    assert "float32" in (groups.refusal(coded("int4", 64, 128, 128), torch.float32) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 256), (4096, 4096), (272, 1024)])
def test_eight_bit_floats_multiply_rows_of_eight_bits(
    outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    if not CUDA or device_gpu().capability < FP8_CAPABILITY:
        pytest.skip("the tensor cores of a device multiply eight-bit floats, no interpreter")
    weight = here(coded("e4m3", outputs, inputs, inputs))
    matmul = TritonCodedMatmul(device_gpu(), dtype)
    packed = matmul.pack(weight)
    assert matmul.takes_rows8(packed)
    weight_YI = weight.columns_YI()
    for rows in (1, 2, *BUCKETS[1:], 130, 400):
        x_TI, bias_Y = rows_of(rows, inputs, dtype).to(DEVICE), torch.randn(outputs).to(dtype)
        rows8 = quantize_rows(x_TI)
        expected_TY = (rows8.widened() @ weight_YI.T).cpu().double()
        assert_near(matmul.apply(rows8, packed, None), expected_TY, dtype)
        # A number half way between two of eight bits may fall to either side. Rows that are not
        # rounded at all are further away: by 0.025, what e4m3 loses.
        apart_TY = matmul.apply(x_TI, packed, None).cpu().double() - expected_TY
        assert apart_TY.norm() <= 0.015 * expected_TY.norm()
        y_TY = matmul.apply(rows8, packed, bias_Y.to(DEVICE))
        assert_near(y_TY, expected_TY + bias_Y.double(), dtype)


def test_channels_refuse_what_they_cannot_multiply() -> None:
    good = coded("e4m3", 64, 128, 128)
    assert channels.refusal(good, torch.bfloat16) is None
    assert "float32" in (channels.refusal(good, torch.float32) or "")
    assert "e4m3" in (channels.refusal(coded("e5m2", 64, 128, 128), torch.bfloat16) or "")
    assert "more scales" in (channels.refusal(coded("e4m3", 64, 128, 64), torch.bfloat16) or "")
    assert "multiples" in (channels.refusal(coded("e4m3", 60, 128, 128), torch.bfloat16) or "")
