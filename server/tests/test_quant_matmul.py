"""Products with coded weights: every implementation against the float64 product of the numbers."""

# T tokens · Y outputs · I inputs · G groups of inputs

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.ops.quant_matmul import CodedWeight, Kind
from headrace.ops.quant_matmul.base import halves, pack_halves
from headrace.ops.quant_matmul.reference import ReferenceCodedMatmul
from headrace.quant.on_load import NF4

DTYPES = [torch.float32, torch.bfloat16]
# What codes may be: integers with and without zero points, values, both kinds of float8.
CODES = ["int4", "nf4", "int8", "e4m3", "e5m2"]
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


def coded(codes: str, outputs: int, inputs: int, group: int, seed: int = 0) -> CodedWeight:
    """A random weight."""
    random = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    scales_YG = torch.rand(outputs, groups, generator=random) * 0.1 + 0.01
    if codes in ("e4m3", "e5m2"):
        dtype = torch.float8_e4m3fn if codes == "e4m3" else torch.float8_e5m2
        # Subnormal numbers as well.
        spread = torch.randn(outputs, inputs, generator=random) * 0.1
        return CodedWeight(Kind.FP8, (spread**3).to(dtype), scales_YG, group, inputs)
    most = 256 if codes == "int8" else 16
    numbers = torch.randint(0, most, (outputs, inputs), generator=random).to(torch.uint8)
    if codes == "nf4":
        return CodedWeight(
            Kind.INT4, pack_halves(numbers), scales_YG, group, inputs, values=torch.tensor(NF4)
        )
    zeros_YG = torch.randint(0, most, (outputs, groups), generator=random).float()
    kind = Kind.INT8 if codes == "int8" else Kind.INT4
    packed = numbers if codes == "int8" else pack_halves(numbers)
    return CodedWeight(kind, packed, scales_YG, group, inputs, zeros_YG)


def numbers_of(weight: CodedWeight) -> Tensor:
    """weight_YI in float64, number by number."""
    codes = halves(weight.codes) if weight.kind == Kind.INT4 else weight.codes
    values = codes.float().double()
    if weight.values is not None:
        values = weight.values.double()[codes.long()]
    result = torch.empty(weight.outputs, weight.columns, dtype=torch.float64)
    for column in range(weight.columns):
        group = column // weight.group
        zero = 0.0 if weight.zeros_YG is None else weight.zeros_YG[:, group].double()
        result[:, column] = (values[:, column] - zero) * weight.scales_YG[:, group].double()
    return result


def rows_of(rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Rows that are further apart than they are long."""
    random = torch.Generator().manual_seed(3)
    return torch.randn(rows, inputs + 3, generator=random).to(dtype)[:, :inputs]


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


def test_columns_in_another_order_are_put_back() -> None:
    weight = coded("int4", 8, 64, 32)
    order_I = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    moved = CodedWeight(Kind.INT4, weight.codes, weight.scales_YG, 32, 64, weight.zeros_YG, order_I)
    expected_YX = torch.empty(8, 64, dtype=torch.float64)
    expected_YX[:, order_I] = numbers_of(weight)
    torch.testing.assert_close(moved.dequantize().double(), expected_YX, rtol=1e-6, atol=1e-6)
