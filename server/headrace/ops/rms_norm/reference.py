"""RMS normalisation in plain PyTorch."""

# T tokens · D width

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises over the last dimension in float32, rounds, then scales.

    Args:
        x: any shape; the last dimension is that of `weight`.

    Returns: a new tensor like `x`.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Adds `x_TD` to the residual stream and normalises the sum.

    Returns: the normalised sum, and the sum. `residual_TD` may be overwritten with the sum.
    """
    residual_TD = residual_TD + x_TD
    return rms_norm(residual_TD, weight_D, eps), residual_TD
