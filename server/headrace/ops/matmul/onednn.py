"""The matrix product on the CPU over weights that oneDNN has packed into its own blocked layout.

Packed weights are read at the memory's speed; `F.linear` reorders them at each call, and reaches
half of it at small batches.
"""

# T tokens · Y outputs · X inputs

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.ops.base import No, OpSpec, Yes

if TYPE_CHECKING:
    from headrace.device.base import Device


# Operators that PyTorch offers its own compiler, and promises nobody.
_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


class OnednnMatmul:
    """Weights packed by `mkldnn._reorder_linear_weight`."""

    def __init__(self) -> None:
        # Bound once: attribute look-up through `torch.ops` costs a microsecond a call.
        self._reorder = torch.ops.mkldnn._reorder_linear_weight.default
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def pack(self, weight_YX: Tensor) -> Tensor:
        return self._reorder(weight_YX.contiguous())

    def apply(self, x_TX: Tensor, packed: Tensor, bias_Y: Tensor | None) -> Tensor:
        return self._linear(x_TX, packed, bias_Y, "none", [], "")


class Onednn:
    """The candidate."""

    name = "onednn"

    def supports(self, spec: OpSpec, device: Device) -> Yes | No:
        if device.kind != "cpu":
            return No("runs on the CPU")
        if spec.dtype not in (torch.bfloat16, torch.float32):
            return No(f"has no {spec.dtype} path worth taking")
        if not torch.backends.mkldnn.is_available():
            return No("this PyTorch is built without oneDNN")
        missing = [name for name in _OPERATORS if not hasattr(torch.ops.mkldnn, name)]
        if missing:
            return No(f"this PyTorch does not offer mkldnn.{missing[0]}")
        if spec.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return No("oneDNN has no bf16 on this CPU")
        return Yes("weights packed once by oneDNN")

    def build(self, spec: OpSpec, device: Device) -> OnednnMatmul:
        return OnednnMatmul()
