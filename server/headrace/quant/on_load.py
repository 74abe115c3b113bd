"""Checkpoints of 16 bits whose layers are quantized when they are loaded, each rank its own share.

`fp8` and `int8` have a scale for each output; `nf4` and `fp4` have 16 values (those of the
bitsandbytes library) and a scale for every 64 inputs.
"""

# Y outputs · X inputs · G groups of inputs

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.errors import ConfigError
from headrace.ops.quant_matmul.base import CodedWeight, Kind, pack_halves
from headrace.quant.base import LinearMethod, LinearShape
from headrace.quant.coded import declare_bias, make_method
from headrace.quant.compressed import int8_weight
from headrace.quant.parameter import Declares, Split

if TYPE_CHECKING:
    from headrace.ops import OpTable

GROUP = 64
_FP8 = torch.float8_e4m3fn
# Quantiles of a normal distribution, zero among them, as the NF4 data type names them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A sign, two bits of exponent and one of mantissa, the largest scaled to one.
FP4 = tuple(
    sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)

KINDS = {"fp8": Kind.FP8, "int8": Kind.INT8, "nf4": Kind.INT4, "fp4": Kind.INT4}


@dataclass(frozen=True)
class OnLoad:
    """The format: `fp8`, `int8`, `nf4` or `fp4`."""

    name: str

    def declare(self, module: Declares, shape: LinearShape, dtype: torch.dtype) -> None:
        if KINDS[self.name] == Kind.INT4 and shape.inputs.size % 2 != 0:
            raise ConfigError(
                f"{self.name} has two inputs a byte, and a shard has {shape.inputs.size}: take "
                "--quantize eetq or fp8"
            )
        columns = Split(0, shape.outputs)
        if shape.by_inputs:
            module.declare("weight", Split(1, (shape.inputs,)), shape.rows, dtype)
        else:
            module.declare("weight", columns, shape.inputs.full, dtype)
        declare_bias(module, shape, dtype)

    def method(self, module: Declares, shape: LinearShape, ops: OpTable) -> LinearMethod:
        weight_YX = module.take("weight")
        assert weight_YX is not None
        return make_method(quantize(self.name, weight_YX), module, shape, ops)


def quantize(name: str, weight_YX: Tensor) -> CodedWeight:
    """Rounds a weight to the nearest codes of a format."""
    if name == "fp8":
        most_Y1 = weight_YX.abs().amax(dim=1, keepdim=True).float()
        scales_YG = most_Y1.clamp(min=1e-12) / torch.finfo(_FP8).max
        codes = (weight_YX.float() / scales_YG).to(_FP8)
        inputs = weight_YX.shape[1]
        return CodedWeight(Kind.FP8, codes, scales_YG, inputs, inputs)
    if name == "int8":
        most_Y1 = weight_YX.abs().amax(dim=1, keepdim=True).float()
        scales_YG = most_Y1.clamp(min=1e-12) / 127
        return int8_weight((weight_YX.float() / scales_YG).round().to(torch.int8), scales_YG)
    return _by_values(weight_YX, torch.tensor(NF4 if name == "nf4" else FP4, dtype=torch.float32))


def _by_values(weight_YX: Tensor, values: Tensor) -> CodedWeight:
    outputs, inputs = weight_YX.shape
    values = values.to(weight_YX.device)
    groups = -(-inputs // GROUP)
    filled = torch.nn.functional.pad(weight_YX, (0, groups * GROUP - inputs))
    grouped_YGx = filled.float().view(outputs, groups, GROUP)
    scales_YG = grouped_YGx.abs().amax(dim=2).clamp(min=1e-12)
    grouped_YGx = grouped_YGx / scales_YG.unsqueeze(2)
    ordered, codes = values.sort(stable=True)
    between = (ordered[1:] + ordered[:-1]) / 2
    nearest = codes[torch.bucketize(grouped_YGx, between)].to(torch.uint8)
    return CodedWeight(
        kind=Kind.INT4,
        codes=pack_halves(nearest.flatten(1)[:, :inputs]),
        scales_YG=scales_YG,
        group=min(GROUP, inputs),
        inputs=inputs,
        values=values,
    )
