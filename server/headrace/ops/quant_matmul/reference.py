"""The matrix product with a coded weight in plain PyTorch."""

# T tokens · Y outputs · I inputs

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.quant_matmul.base import CodedWeight
from headrace.ops.rows8 import Rows8, in_model_dtype
from headrace.ops.rows8.reference import quantize_rows


class ReferenceCodedMatmul:
    """Dequantizes the whole weight at each call, and multiplies in float32."""

    def pack(self, weight: CodedWeight) -> CodedWeight:
        return weight

    def takes_rows8(self, packed: CodedWeight) -> bool:
        del packed
        return False

    def apply(self, x_TI: Tensor | Rows8, packed: CodedWeight, bias_Y: Tensor | None) -> Tensor:
        x_TI = in_model_dtype(x_TI)
        bias_Y = None if bias_Y is None else bias_Y.float()
        return F.linear(x_TI.float(), packed.columns_YI(), bias_Y).to(x_TI.dtype)


class ReferenceRows8Matmul(ReferenceCodedMatmul):
    """The same with inputs rounded to rows of eight bits, as GPUs multiply eight-bit floats."""

    def __init__(self, dtype: torch.dtype) -> None:
        """
        Args:
            dtype: of results.
        """
        self._dtype = dtype

    def takes_rows8(self, packed: CodedWeight) -> bool:
        del packed
        return True

    def apply(self, x_TI: Tensor | Rows8, packed: CodedWeight, bias_Y: Tensor | None) -> Tensor:
        rows = x_TI if isinstance(x_TI, Rows8) else quantize_rows(x_TI)
        return super().apply(rows.widened(), packed, bias_Y).to(self._dtype)
