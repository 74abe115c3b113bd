"""RMS normalisation by the kernel library: float32 throughout, rounded once at the end."""

# T tokens · D width

from __future__ import annotations

import torch
from torch import Tensor

from headrace.native import Kernels, type_of


class NativeRmsNorm:
    """Signatures and meaning: `reference.py`."""

    def __init__(self, kernels: Kernels) -> None:
        self._call = kernels.rms_norm

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        width = weight.shape[0]
        rows = x.numel() // width
        self._call(
            *(x.data_ptr(), None, weight.data_ptr(), eps, type_of(x.dtype), rows, width),
            y.data_ptr(),
        )
        return y

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
        y_TD = torch.empty_like(x_TD)
        rows, width = x_TD.shape
        self._call(
            *(x_TD.data_ptr(), residual_TD.data_ptr(), weight_D.data_ptr(), eps),
            *(type_of(x_TD.dtype), rows, width, y_TD.data_ptr()),
        )
        return y_TD, residual_TD
