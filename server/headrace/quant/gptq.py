"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

Of a layer with X inputs and Y outputs `qweight` is int32 [X · bits / 32, Y]: each number holds the
codes of 32 / bits inputs, the first in its lowest bits. `scales` are [G, Y], `qzeros` int32
[G, Y · bits / 32], packed along the outputs. `g_idx` [X] says which group each input belongs to;
where inputs were quantized in their own order (`desc_act`) that is not the order of the inputs.
The first version of the format stores zero points minus one, the second as they are.
"""

# Y outputs · X inputs · G groups of inputs

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.ops.quant_matmul.base import CodedWeight, Kind, halves
from headrace.quant.base import LinearMethod, LinearShape, in_units
from headrace.quant.coded import (
    CodedMethod,
    JoinedMethod,
    declare_bias,
    in_order_of_groups,
    make_method,
    take_bias,
)
from headrace.quant.parameter import Declares, Part, Split

if TYPE_CHECKING:
    from headrace.ops import OpTable

_WORD = 32  # bits


@dataclass(frozen=True)
class Gptq:
    """The format.

    Attributes:
        bits: 4 or 8.
        group: inputs that share a scale; -1: all.
        desc_act: whether `g_idx` must be read.
        zeros_minus_one: whether it is the first version.
    """

    bits: int
    group: int
    desc_act: bool
    zeros_minus_one: bool
    name = "gptq"

    @property
    def kind(self) -> Kind:
        return Kind.INT4 if self.bits == 4 else Kind.INT8

    def declare(self, module: Declares, shape: LinearShape, dtype: torch.dtype) -> None:
        word = _WORD // self.bits
        inputs, rows = shape.inputs, shape.rows
        group = inputs.full if self.group == -1 else self.group
        if shape.by_inputs:
            # An input of any place may belong to any group.
            whole = self.desc_act or self.group == -1
            all_groups = Part.whole(-(-inputs.full // group))
            groups = Split(0, (all_groups if whole else in_units(inputs, group, "inputs"),))
            module.declare("qweight", Split(0, (in_units(inputs, word, "inputs"),)), rows, _INT)
            module.declare("scales", groups, rows, torch.float32)
            words = in_units(shape.outputs[0], word, "outputs").size
            module.declare("qzeros", groups, words, _INT)
        else:
            in_units(Part(inputs.full, 0, inputs.full), word, "inputs")
            groups = -(-inputs.full // group)
            module.declare("qweight", Split(1, shape.outputs), -(-inputs.full // word), _INT)
            module.declare("scales", Split(1, shape.outputs), groups, torch.float32)
            words = tuple(in_units(part, word, "outputs") for part in shape.outputs)
            module.declare("qzeros", Split(1, words), groups, _INT)
        if self.desc_act:
            module.declare("g_idx", Split(0, (inputs,) * len(shape.outputs)), None, _INT)
        declare_bias(module, shape, dtype)

    def method(self, module: Declares, shape: LinearShape, ops: OpTable) -> LinearMethod:
        qweight, qzeros = module.take("qweight"), module.take("qzeros")
        scales_GY, g_idx = module.take("scales"), module.take("g_idx")
        assert qweight is not None and qzeros is not None and scales_GY is not None
        zeros_GY = _bytes(qzeros).flatten(1)
        zeros_GY = halves(zeros_GY) if self.bits == 4 else zeros_GY
        if self.zeros_minus_one:
            zeros_GY = zeros_GY + 1 & (1 << self.bits) - 1
        inputs = shape.inputs.size
        weight = CodedWeight(
            kind=self.kind,
            codes=_bytes(qweight).permute(1, 0, 2).flatten(1),
            scales_YG=scales_GY.T.contiguous(),
            group=min(shape.inputs.full if self.group == -1 else self.group, inputs),
            inputs=inputs,
            zeros_YG=zeros_GY.T.float(),
        )
        if g_idx is None:
            return make_method(weight, module, shape, ops)
        orders = g_idx.view(len(shape.outputs), inputs)
        if g_idx.is_meta or bool((orders == orders[0]).all()):
            return make_method(in_order_of_groups(weight, orders[0]), module, shape, ops)
        bias_Y = take_bias(module, shape)
        parts: list[CodedMethod] = []
        at = 0
        for part, order in zip(shape.outputs, orders, strict=True):
            rows = slice(at, at + part.size)
            share = in_order_of_groups(_rows(weight, rows), order)
            bias = None if bias_Y is None else bias_Y[rows]
            parts.append(CodedMethod(share, bias, ops.coded_matmul[share.kind]))
            at += part.size
        return JoinedMethod(parts)


_INT = torch.int32


def _bytes(words: Tensor) -> Tensor:
    """Returns the bytes of int32 [A, B] as uint8 [A, B, 4], the lowest first."""
    return words.contiguous().view(torch.uint8).view(*words.shape, 4)


def _rows(weight: CodedWeight, rows: slice) -> CodedWeight:
    zeros_YG = weight.zeros_YG
    return replace(
        weight,
        codes=weight.codes[rows],
        scales_YG=weight.scales_YG[rows],
        zeros_YG=None if zeros_YG is None else zeros_YG[rows],
    )
