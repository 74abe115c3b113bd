"""The matrix product with a coded weight in plain PyTorch."""

# T tokens · Y outputs · I inputs

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace.ops.quant_matmul.base import CodedWeight


class ReferenceCodedMatmul:
    """Dequantizes the whole weight at each call, and multiplies in float32."""

    def pack(self, weight: CodedWeight) -> CodedWeight:
        return weight

    def apply(self, x_TI: Tensor, packed: CodedWeight, bias_Y: Tensor | None) -> Tensor:
        bias_Y = None if bias_Y is None else bias_Y.float()
        return F.linear(x_TI.float(), packed.columns_YI(), bias_Y).to(x_TI.dtype)
