"""What the rotation's implementations share: how queries, keys and values are laid out."""

# T tokens · C = (H + 2K)·E columns of the fused projection

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from headrace.ops.kv_write.base import UNIT, KvScales


@dataclass(frozen=True)
class QkvLayout:
    """A row of the fused projection: H queries, then K keys, then K values, of E numbers each."""

    heads: int  # H, local
    kv_heads: int  # K, local
    head_dim: int  # E

    @property
    def columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class QkNorm:
    """Weights of the RMS norms that queries and keys pass before they are rotated."""

    q_E: Tensor
    k_E: Tensor
    eps: float


class RopeAndKvWrite(Protocol):
    """Normalises (if asked) and rotates queries and keys, then writes keys and values."""

    def __call__(
        self,
        qkv_TC: Tensor,
        cos_sin_TE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        cells_T: Tensor,
        layout: QkvLayout,
        norm: QkNorm | None,
        scales: KvScales = UNIT,
    ) -> Tensor:
        """
        Args:
            qkv_TC: the fused projection, contiguous; its query and key columns may be overwritten.
            cos_sin_TE: float32; a row is the E/2 cosines, then the E/2 sines, of its position.
            cells_T: int64, cell (block · P + offset) that each token's key and value go to.
            scales: of caches that keep codes: keys and values are divided by them.

        Returns: the rotated queries q_THE; may be a view of `qkv_TC` (row stride C).
        """
        ...
