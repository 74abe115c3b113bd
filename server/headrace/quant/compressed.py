"""Checkpoints of the compressed-tensors library (llm-compressor).

`pack-quantized`: `weight_packed` is int32 [Y, X · bits / 32], the codes of 32 / bits inputs in each
number, the first in its lowest bits; a code is the signed integer plus half the range.
`int-quantized`: `weight` is int8 [Y, X]. Scales are `weight_scale` [Y, G] or one number; zero
points of groups are packed along the outputs. `float-quantized` is the format of `fp8.py`.
"""

# Y outputs · X inputs · G groups of inputs

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.ops.quant_matmul.base import CodedWeight, Kind, halves
from headrace.quant.base import LinearMethod, LinearShape, in_units
from headrace.quant.coded import declare_bias, in_order_of_groups, make_method
from headrace.quant.fp8 import scale_rows
from headrace.quant.parameter import Declares, Part, Split

if TYPE_CHECKING:
    from headrace.ops import OpTable

_WORD = 32  # bits
_INT8_ZERO = 128


@dataclass(frozen=True)
class PackedIntegers:
    """`pack-quantized`.

    Attributes:
        bits: 4 or 8.
        group: inputs that share a scale; -1: all.
        symmetric: whether there are no zero points.
        ordered: whether `weight_g_idx` says which group an input belongs to.
    """

    bits: int
    group: int
    symmetric: bool
    ordered: bool
    name = "compressed-tensors"

    def declare(self, module: Declares, shape: LinearShape, dtype: torch.dtype) -> None:
        word, integer = _WORD // self.bits, torch.int32
        inputs, columns = shape.inputs, Split(0, shape.outputs)
        group = inputs.full if self.group == -1 else self.group
        words = in_units(inputs, word, "inputs")
        groups = Part.whole(-(-inputs.full // group))
        divided = shape.by_inputs and not self.ordered and self.group != -1
        if divided:
            groups = in_units(inputs, group, "inputs")
        by_groups = Split(1, (groups,))
        if shape.by_inputs:
            module.declare("weight_packed", Split(1, (words,)), shape.rows, integer)
            module.declare("weight_scale", by_groups, shape.rows, torch.float32)
        else:
            module.declare("weight_packed", columns, words.full, integer)
            module.declare("weight_scale", columns, groups.full, torch.float32)
        if not self.symmetric:
            rows = tuple(in_units(part, word, "outputs") for part in shape.outputs)
            if shape.by_inputs:
                module.declare("weight_zero_point", by_groups, rows[0].size, integer)
            else:
                module.declare("weight_zero_point", Split(0, rows), groups.full, integer)
        if self.ordered:
            module.declare("weight_g_idx", Split(0, (inputs,) * len(shape.outputs)), None, integer)
        declare_bias(module, shape, dtype)

    def method(self, module: Declares, shape: LinearShape, ops: OpTable) -> LinearMethod:
        words, scales_YG = module.take("weight_packed"), module.take("weight_scale")
        zeros, g_idx = module.take("weight_zero_point"), module.take("weight_g_idx")
        assert words is not None and scales_YG is not None
        inputs = shape.inputs.size
        zeros_YG = torch.full_like(scales_YG, 1 << self.bits - 1)
        if zeros is not None:
            zeros_YG = _unpack(zeros.T, self.bits).T.float()
        weight = CodedWeight(
            kind=Kind.INT4 if self.bits == 4 else Kind.INT8,
            codes=words.contiguous().view(torch.uint8),
            scales_YG=scales_YG,
            group=inputs if self.group == -1 else min(self.group, inputs),
            inputs=inputs,
            zeros_YG=zeros_YG.contiguous(),
        )
        if g_idx is not None:
            # What shares its input was quantized in one order.
            weight = in_order_of_groups(weight, g_idx[:inputs])
        return make_method(weight, module, shape, ops)


@dataclass(frozen=True)
class Int8:
    """`int-quantized`, symmetric.

    Attributes:
        channel: whether each output has a scale, or else the tensor.
        static: whether a scale of the activations is stored. They keep the model's dtype.
    """

    channel: bool
    static: bool
    name = "compressed-tensors"

    def declare(self, module: Declares, shape: LinearShape, dtype: torch.dtype) -> None:
        columns = Split(0, shape.outputs)
        if shape.by_inputs:
            module.declare("weight", Split(1, (shape.inputs,)), shape.rows, torch.int8)
        else:
            module.declare("weight", columns, shape.inputs.full, torch.int8)
        each = Split(0, (Part.whole(1),) * len(shape.outputs))
        module.declare("weight_scale", columns if self.channel else each, None, torch.float32)
        if self.static:
            module.declare("input_scale", each, None, torch.float32)
        declare_bias(module, shape, dtype)

    def method(self, module: Declares, shape: LinearShape, ops: OpTable) -> LinearMethod:
        weight_YX, scale = module.take("weight"), module.take("weight_scale")
        module.take("input_scale")
        assert weight_YX is not None and scale is not None
        scales_YG = scale.view(-1, 1)
        if not self.channel:
            scales_YG = scale_rows(scales_YG, [part.size for part in shape.outputs])
        return make_method(int8_weight(weight_YX, scales_YG), module, shape, ops)


def int8_weight(weight_YX: Tensor, scales_YG: Tensor) -> CodedWeight:
    """Returns the weight of signed integers [Y, X] with a scale for each output."""
    inputs = weight_YX.shape[1]
    return CodedWeight(
        kind=Kind.INT8,
        codes=weight_YX.contiguous().view(torch.uint8) ^ _INT8_ZERO,
        scales_YG=scales_YG.contiguous(),
        group=inputs,
        inputs=inputs,
        zeros_YG=torch.full_like(scales_YG, _INT8_ZERO),
    )


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Returns the codes uint8 [A, B · 32 / bits] of int32 [A, B]."""
    codes = words.contiguous().view(torch.uint8)
    return halves(codes) if bits == 4 else codes
