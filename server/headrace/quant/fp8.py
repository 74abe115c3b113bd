"""Weights of eight-bit floating-point numbers, with a scale a tensor, an output or a block.

Activations keep the model's dtype: what is stored for them (`input_scale`) is read, so that a
kernel that computes in eight bits finds it, and otherwise without effect.
"""

# Y outputs · X inputs · G groups of inputs

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.ops.quant_matmul.base import CodedWeight, Kind
from headrace.quant.base import LinearMethod, LinearShape, in_units
from headrace.quant.coded import declare_bias, make_method
from headrace.quant.parameter import Declares, Part, Split

if TYPE_CHECKING:
    from headrace.ops import OpTable


@dataclass(frozen=True)
class Fp8:
    """The format.

    Attributes:
        scale: what has a scale of its own: `tensor`, `channel` (an output) or `block`.
        block: outputs and inputs of a block.
        leaf: how the checkpoint calls the scales.
        static: whether it stores a scale of the activations.
        dtype: of the numbers.
    """

    scale: str
    block: tuple[int, int] = (128, 128)
    leaf: str = "weight_scale"
    static: bool = False
    dtype: torch.dtype = torch.float8_e4m3fn
    name = "fp8"

    def declare(self, module: Declares, shape: LinearShape, dtype: torch.dtype) -> None:
        columns, inputs = Split(0, shape.outputs), shape.inputs
        if shape.by_inputs:
            module.declare("weight", Split(1, (inputs,)), shape.rows, self.dtype)
        else:
            module.declare("weight", columns, inputs.full, self.dtype)
        each = Split(0, (Part.whole(1),) * len(shape.outputs))
        if self.scale == "tensor":
            module.declare(self.leaf, each, None, torch.float32)
        elif self.scale == "channel":
            module.declare(self.leaf, columns, None, torch.float32)
        elif shape.by_inputs:
            blocks = Split(1, (in_units(inputs, self.block[1], "inputs"),))
            rows = -(-shape.rows // self.block[0])
            module.declare(self.leaf, blocks, rows, torch.float32)
        else:
            blocks = tuple(in_units(part, self.block[0], "outputs") for part in shape.outputs)
            across = -(-inputs.full // self.block[1])
            module.declare(self.leaf, Split(0, blocks), across, torch.float32)
        if self.static:
            module.declare("input_scale", each, None, torch.float32)
        declare_bias(module, shape, dtype)

    def method(self, module: Declares, shape: LinearShape, ops: OpTable) -> LinearMethod:
        codes, scale = module.take("weight"), module.take(self.leaf)
        module.take("input_scale")
        assert codes is not None and scale is not None
        inputs = shape.inputs.size
        weight = CodedWeight(
            kind=Kind.FP8,
            codes=codes,
            scales_YG=self._scales(scale, shape),
            group=min(self.block[1], inputs) if self.scale == "block" else inputs,
            inputs=inputs,
        )
        return make_method(weight, module, shape, ops)

    def _scales(self, scale: Tensor, shape: LinearShape) -> Tensor:
        """Returns a row of scales for each output."""
        if self.scale == "channel":
            return scale.view(-1, 1)
        if self.scale == "tensor":
            return scale_rows(scale.view(-1, 1), [part.size for part in shape.outputs])
        rows: list[Tensor] = []
        at = 0
        for part in shape.outputs:
            blocks = -(-part.size // self.block[0])
            spread = scale[at : at + blocks].repeat_interleave(self.block[0], dim=0)
            rows.append(spread[: part.size])
            at += blocks
        return torch.cat(rows)


def scale_rows(scale_PG: Tensor, sizes: list[int]) -> Tensor:
    """Returns scales_YG, where each part of so many outputs has one row of scales."""
    return torch.cat([row.expand(n, -1) for row, n in zip(scale_PG, sizes, strict=True)])
