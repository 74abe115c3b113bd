"""No quantisation: a weight, and perhaps a bias, in the activations' dtype."""

# T tokens · Y outputs · X inputs

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headrace.ops.matmul.base import GatedMatmul, IntoMatmul
from headrace.ops.rows8 import Rows8, in_model_dtype
from headrace.quant.base import LinearShape
from headrace.quant.parameter import Declares, Split

if TYPE_CHECKING:
    from headrace.ops import OpTable
    from headrace.ops.matmul import MatmulBackend


class PlainMethod:
    """A packed weight and its bias."""

    order_I = None  # Inputs are multiplied in their own order.
    takes_rows8 = False

    def __init__(self, weight_YX: Tensor, bias_Y: Tensor | None, matmul: MatmulBackend) -> None:
        self.nbytes = weight_YX.nbytes
        self._inputs = weight_YX.shape[1]
        self._dtype = weight_YX.dtype
        self._device = weight_YX.device
        self.packed: Any = matmul.pack(weight_YX)
        self.bias_Y = bias_Y
        self._apply = matmul.apply
        self._into = matmul if isinstance(matmul, IntoMatmul) and bias_Y is None else None
        self._gated = matmul if isinstance(matmul, GatedMatmul) and bias_Y is None else None

    def apply(self, x_TX: Tensor | Rows8) -> Tensor:
        return self._apply(in_model_dtype(x_TX), self.packed, self.bias_Y)

    def apply_gated(self, x_TX: Tensor | Rows8) -> Tensor | None:
        if self._gated is None:
            return None
        return self._gated.apply_gated(in_model_dtype(x_TX), self.packed)

    def apply_into(self, x_TX: Tensor | Rows8, out_TY: Tensor) -> bool:
        if self._into is None:
            return False
        self._into.apply_into(in_model_dtype(x_TX), self.packed, out_TY)
        return True

    def dequantize(self) -> Tensor:
        # The packed layout is the backend's secret: the unit matrix brings the weight back.
        eye = torch.eye(self._inputs, dtype=self._dtype, device=self._device)
        return self._apply(eye, self.packed, None).T


class Plain:
    """The format of checkpoints that name no other."""

    name = "none"

    def declare(self, module: Declares, shape: LinearShape, dtype: torch.dtype) -> None:
        columns = Split(0, shape.outputs)
        if shape.inputs.size == shape.inputs.full:
            module.declare("weight", columns, shape.inputs.full, dtype)
        else:
            module.declare("weight", Split(1, (shape.inputs,)), columns.size, dtype)
        if shape.bias:
            module.declare("bias", columns, None, dtype)

    def method(self, module: Declares, shape: LinearShape, ops: OpTable) -> PlainMethod:
        weight_YX = module.take("weight")
        assert weight_YX is not None, "a linear layer was finished twice"
        bias_Y = module.take("bias")
        # Where the inputs are divided, ranks' outputs are summed: the bias is the first rank's.
        mine = shape.inputs.start == 0
        return PlainMethod(weight_YX, bias_Y if mine else None, ops.matmul)
