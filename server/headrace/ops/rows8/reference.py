"""Rows of activations in eight bits, in plain PyTorch."""

# T tokens · X columns · D width · F mlp width

from __future__ import annotations

from torch import Tensor

from headrace.ops.rms_norm import reference as norms
from headrace.ops.rows8.base import DTYPE, MOST, SCALE_MIN, Rows8
from headrace.ops.silu_mul import reference as activations


def quantize_rows(x_TX: Tensor) -> Rows8:
    """Rounds each row to the nearest numbers of eight bits, scaled by its largest."""
    wide_TX = x_TX.float()
    scale_T = (wide_TX.abs().amax(dim=1) / MOST).clamp(min=SCALE_MIN)
    return Rows8((wide_TX / scale_T[:, None]).clamp(-MOST, MOST).to(DTYPE), scale_T)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Rows8:
    """The norm (see `ops/rms_norm`), its rows rounded."""
    return quantize_rows(norms.rms_norm(x_TD, weight_D, eps))


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Rows8, Tensor]:
    """The norm of the sum, its rows rounded, and the sum."""
    normed_TD, residual_TD = norms.add_rms_norm(x_TD, residual_TD, weight_D, eps)
    return quantize_rows(normed_TD), residual_TD


def silu_mul(gate_up_T2F: Tensor) -> Rows8:
    """The gated activation (see `ops/silu_mul`), its rows rounded."""
    return quantize_rows(activations.silu_mul(gate_up_T2F))
