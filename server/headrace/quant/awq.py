"""AWQ checkpoints in the `gemm` layout, as AutoAWQ writes them.

Of a layer with X inputs and Y outputs `qweight` is int32 [X, Y / 8]: each number holds the codes of
eight outputs, from its lowest bits on the outputs 0, 2, 4, 6, 1, 3, 5, 7. `qzeros` [G, Y / 8] are
packed alike, `scales` are [G, Y].
"""

# Y outputs · X inputs · G groups of inputs

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.ops.quant_matmul.base import CodedWeight, Kind, halves, pack_halves
from headrace.quant.base import LinearMethod, LinearShape, in_units
from headrace.quant.coded import declare_bias, make_method
from headrace.quant.parameter import Declares, Part, Split

if TYPE_CHECKING:
    from headrace.ops import OpTable

_WORD = 8  # codes in a number
# At which place of a number the code of each output lies.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Awq:
    """The format.

    Attributes:
        group: inputs that share a scale; -1: all.
    """

    group: int
    name = "awq"

    def declare(self, module: Declares, shape: LinearShape, dtype: torch.dtype) -> None:
        inputs, integer = shape.inputs, torch.int32
        group = inputs.full if self.group == -1 else self.group
        if shape.by_inputs:
            words = in_units(shape.outputs[0], _WORD, "outputs").size
            all_groups = Part.whole(1) if self.group == -1 else in_units(inputs, group, "inputs")
            groups = Split(0, (all_groups,))
            module.declare("qweight", Split(0, (inputs,)), words, integer)
            module.declare("qzeros", groups, words, integer)
            module.declare("scales", groups, shape.rows, torch.float32)
        else:
            words = Split(1, tuple(in_units(part, _WORD, "outputs") for part in shape.outputs))
            groups = -(-inputs.full // group)
            module.declare("qweight", words, inputs.full, integer)
            module.declare("qzeros", words, groups, integer)
            module.declare("scales", Split(1, shape.outputs), groups, torch.float32)
        declare_bias(module, shape, dtype)

    def method(self, module: Declares, shape: LinearShape, ops: OpTable) -> LinearMethod:
        qweight, qzeros = module.take("qweight"), module.take("qzeros")
        scales_GY = module.take("scales")
        assert qweight is not None and qzeros is not None and scales_GY is not None
        inputs = shape.inputs.size
        weight = CodedWeight(
            kind=Kind.INT4,
            codes=pack_halves(_unpack(qweight).T.contiguous()),
            scales_YG=scales_GY.T.contiguous(),
            group=inputs if self.group == -1 else min(self.group, inputs),
            inputs=inputs,
            zeros_YG=_unpack(qzeros).T.float(),
        )
        return make_method(weight, module, shape, ops)


def _unpack(words: Tensor) -> Tensor:
    """Returns the codes uint8 [A, 8 B] of int32 [A, B], in the order of the outputs."""
    codes = halves(words.contiguous().view(torch.uint8)).unflatten(1, (-1, _WORD))
    return codes[..., list(_PLACES)].flatten(1)
