"""The matrix product in plain PyTorch."""

# T tokens · Y outputs · X inputs

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class ReferenceMatmul:
    """The weight stays as the checkpoint has it."""

    def pack(self, weight_YX: Tensor) -> Tensor:
        return weight_YX

    def apply(self, x_TX: Tensor, packed: Tensor, bias_Y: Tensor | None) -> Tensor:
        return F.linear(x_TX, packed, bias_Y)
