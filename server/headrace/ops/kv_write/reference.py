"""Writing keys and values into the paged cache, in plain PyTorch."""

# T tokens · K local kv heads · E head dim · N blocks · P tokens per block

from __future__ import annotations

from torch import Tensor

from headrace.ops.kv_write.base import UNIT, KvScales, encode, plain


def kv_write(
    k_TKE: Tensor,
    v_TKE: Tensor,
    k_cache_NPKE: Tensor,
    v_cache_NPKE: Tensor,
    cells_T: Tensor,
    scales: KvScales = UNIT,
) -> None:
    """Writes token t's key and value to cell `cells_T[t]` (block · P + offset) of both caches."""
    for x_TKE, cache_NPKE, scale in (
        (k_TKE, k_cache_NPKE, scales.k),
        (v_TKE, v_cache_NPKE, scales.v),
    ):
        kept = plain(encode(x_TKE, cache_NPKE.dtype, scale))
        plain(cache_NPKE).flatten(0, 1).index_copy_(0, cells_T, kept)
