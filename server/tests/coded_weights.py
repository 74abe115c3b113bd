"""Random coded weights for tests, and the numbers that they are."""

# T tokens · Y outputs · I inputs · G groups of inputs

from __future__ import annotations

from dataclasses import replace

import torch
from device_here import DEVICE
from torch import Tensor

from headrace.ops.quant_matmul import CodedWeight, Kind
from headrace.ops.quant_matmul.base import halves, pack_halves
from headrace.quant.on_load import NF4

# What codes may be: integers with and without zero points, values, both kinds of float8.
CODES = ["int4", "nf4", "int8", "e4m3", "e5m2"]


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


def here(weight: CodedWeight) -> CodedWeight:
    """The weight on the device that tests of kernels run on."""
    zeros, values = weight.zeros_YG, weight.values
    return replace(
        weight,
        codes=weight.codes.to(DEVICE),
        scales_YG=weight.scales_YG.to(DEVICE),
        zeros_YG=None if zeros is None else zeros.to(DEVICE),
        values=None if values is None else values.to(DEVICE),
    )
