"""QK-norm, rotation and the write to the cache in one pass, by the kernel library."""

# T tokens · H local query heads · K local kv heads · E head dim · C = (H + 2K)·E
# N blocks · P tokens per block

from __future__ import annotations

from torch import Tensor

from headrace.native import Kernels, type_of
from headrace.ops.kv_write.base import UNIT, KvScales
from headrace.ops.rope.base import QkNorm, QkvLayout, RopeAndKvWrite


def native_rope_and_kv_write(kernels: Kernels) -> RopeAndKvWrite:
    """Returns what `reference.rope_and_kv_write` is; queries are rotated in place."""
    call = kernels.rope_and_kv_write

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
        assert scales == UNIT and k_cache_NPKE.dtype == qkv_TC.dtype
        tokens, dim = qkv_TC.shape[0], layout.head_dim
        assert qkv_TC.is_contiguous() and cos_sin_TE.is_contiguous() and cells_T.is_contiguous()
        q_norm, k_norm, eps = None, None, 0.0
        if norm is not None:
            q_norm, k_norm, eps = norm.q_E.data_ptr(), norm.k_E.data_ptr(), norm.eps
        call(
            *(qkv_TC.data_ptr(), cos_sin_TE.data_ptr()),
            *(k_cache_NPKE.data_ptr(), v_cache_NPKE.data_ptr(), cells_T.data_ptr()),
            *(type_of(qkv_TC.dtype), tokens, layout.heads, layout.kv_heads, dim, dim),
            *(q_norm, k_norm, eps),
        )
        q_TC = qkv_TC[:, : layout.heads * dim]
        return q_TC.view(tokens, layout.heads, dim)

    return rope_and_kv_write
