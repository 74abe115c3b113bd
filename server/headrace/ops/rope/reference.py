"""Rotary position embedding in plain PyTorch."""

# T tokens · H local query heads · K local kv heads · E head dim · C = (H + 2K)·E

from __future__ import annotations

import torch
from torch import Tensor

from headrace.ops.kv_write.base import UNIT, KvScales
from headrace.ops.kv_write.reference import kv_write
from headrace.ops.rms_norm.reference import rms_norm
from headrace.ops.rope.base import QkNorm, QkvLayout


def rope(x_THE: Tensor, cos_sin_TE: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + E/2]) of every head by their token's angles.

    Args:
        cos_sin_TE: float32; a row is the E/2 cosines, then the E/2 sines, of its position.

    Returns: a new tensor like `x_THE`.
    """
    cos, sin = cos_sin_TE.to(x_THE.dtype).unsqueeze(1).chunk(2, dim=-1)
    low, high = x_THE.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def rope_and_kv_write(
    qkv_TC: Tensor,
    cos_sin_TE: Tensor,
    k_cache_NPKE: Tensor,
    v_cache_NPKE: Tensor,
    cells_T: Tensor,
    layout: QkvLayout,
    norm: QkNorm | None,
    scales: KvScales = UNIT,
) -> Tensor:
    """See `RopeAndKvWrite`. Leaves `qkv_TC` as it is."""
    heads, kv_heads = layout.heads, layout.kv_heads
    all_TXE = qkv_TC.view(qkv_TC.shape[0], heads + 2 * kv_heads, layout.head_dim)
    qk_TXE, v_TKE = all_TXE.split((heads + kv_heads, kv_heads), dim=1)
    if norm is not None:
        q_THE, k_TKE = qk_TXE.split((heads, kv_heads), dim=1)
        q_THE = rms_norm(q_THE, norm.q_E, norm.eps)
        k_TKE = rms_norm(k_TKE, norm.k_E, norm.eps)
        qk_TXE = torch.cat((q_THE, k_TKE), dim=1)
    q_THE, k_TKE = rope(qk_TXE, cos_sin_TE).split((heads, kv_heads), dim=1)
    kv_write(k_TKE, v_TKE, k_cache_NPKE, v_cache_NPKE, cells_T, scales)
    return q_THE
